"""The commands of `llm2vec`: a module each, with a `main(argv)`; its docstring is the command's help."""
