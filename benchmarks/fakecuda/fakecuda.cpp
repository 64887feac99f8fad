// A CUDA device made of CPU memory, for a build of torch without CUDA: tensors whose device is cuda:0.
//
// Three things make one: a guard (which device is current), hooks (what torch asks of CUDA), and a fallback that runs
// each operator on CPU aliases of its arguments. It counts what a GPU's host would have had to wait for.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstring>
#include <mutex>
#include <set>
#include <string>

namespace {
using namespace c10;

std::mutex lock_;
int64_t in_use_ = 0, peak_ = 0;
void (*on_wait_)(const char*) = nullptr;
thread_local DeviceIndex current = 0;

void wait(const std::string& what) {
  if (on_wait_) on_wait_(what.c_str());
}

void count(int64_t bytes) {
  std::lock_guard<std::mutex> held(lock_);
  in_use_ += bytes;
  peak_ = std::max(peak_, in_use_);
}

// --- device and hooks ---

struct Guard final : public impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override {
    auto old = current;
    if (d.index() >= 0) current = d.index();
    return Device(DeviceType::CUDA, old);
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device d) const override { exchangeDevice(d); }
  void uncheckedSetDevice(Device d) const noexcept override { if (d.index() >= 0) current = d.index(); }
  Stream getStream(Device d) const noexcept override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, d.index() < 0 ? current : d.index()));
  }
  Stream getNewStream(Device d, int) const override { return getStream(d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream&, const DeviceIndex, const EventFlag) const override { *event = (void*)1; }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { wait("synchronizeStream"); }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override { wait("synchronizeDevice"); }
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Block { void* data; int64_t bytes; };
struct DeviceAllocator final : public Allocator {
  DataPtr allocate(size_t n) override {
    count(n);
    auto* block = new Block{n ? alloc_cpu(n) : nullptr, (int64_t)n};
    return DataPtr(block->data, block, [](void* context) {
      auto* b = static_cast<Block*>(context);
      count(-b->bytes);
      if (b->data) free_cpu(b->data);
      delete b;
    }, Device(DeviceType::CUDA, current));
  }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
} allocator;
REGISTER_ALLOCATOR(DeviceType::CUDA, &allocator);

struct CUDAHooks final : public at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  void setCurrentDevice(DeviceIndex d) const override { current = d; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { auto old = current; if (d >= 0) current = d; return old; }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchangeDevice(d); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return GetCPUAllocator(); }
  at::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  at::Device getDeviceFromPtr(void*) const override { return Device(DeviceType::CUDA, current); }
  void deviceSynchronize(DeviceIndex) const override { wait("deviceSynchronize"); }
};

// --- operators ---

at::Tensor with_storage(Storage storage, const at::Tensor& like, DispatchKey key) {
  auto tensor = at::detail::make_tensor<TensorImpl>(std::move(storage), DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_neg()) tensor._set_neg(true);
  if (like.is_conj()) tensor._set_conj(true);
  return tensor;
}

struct Aliases {
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // on the "GPU", and its CPU alias
  at::Tensor of(const at::Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    for (auto& p : pairs) if (p.first.is_same(t)) return p.second;
    const auto& storage = t.storage();
    DataPtr data(const_cast<void*>(storage.data()), Device(DeviceType::CPU));
    Storage shared(Storage::use_byte_size_t(), storage.nbytes(), std::move(data), GetCPUAllocator(), true);
    pairs.emplace_back(t, with_storage(std::move(shared), t, DispatchKey::CPU));
    return pairs.back().second;
  }
};

Storage owned(const Storage& cpu, DeviceIndex where) {  // what an operator made on the CPU, as the device's
  struct Held { Storage storage; int64_t bytes; };
  auto* held = new Held{cpu, (int64_t)cpu.nbytes()};
  count(held->bytes);
  DataPtr data(const_cast<void*>(cpu.data()), held, [](void* context) {
    auto* h = static_cast<Held*>(context);
    count(-h->bytes);
    delete h;
  }, Device(DeviceType::CUDA, where));
  return Storage(Storage::use_byte_size_t(), cpu.nbytes(), std::move(data), &allocator, true);
}

// Calls f on every tensor of a value and puts back what it gives.
template <class F> void replace(IValue& value, F f) {
  if (value.isTensor()) value = f(value.toTensor());
  else if (value.isTensorList()) {
    c10::List<at::Tensor> made;
    for (const at::Tensor& t : value.toTensorVector()) made.push_back(f(t));
    value = made;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> made;
    for (const auto& e : value.toOptionalTensorList()) {
      std::optional<at::Tensor> t = e;
      made.push_back(t.has_value() ? std::optional<at::Tensor>(f(*t)) : t);
    }
    value = made;
  }
}

const std::set<std::string> WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::is_nonzero"};

void fallback(const OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto begin = stack->size() - schema.arguments().size();
  Aliases aliases;
  std::vector<at::Tensor> on_host;
  bool from_host = false, on_device = false, blocking = true, by_mask = false;
  DeviceIndex where = -1;
  for (size_t i = begin; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    const bool is_index = value.isOptionalTensorList();
    replace(value, [&](const at::Tensor& t) {
      if (!t.defined()) return t;
      if (t.is_cuda()) { on_device = true; if (where < 0) where = t.device().index(); }
      else { on_host.push_back(t); from_host = from_host || t.dim(); }
      by_mask = by_mask || (is_index && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte));
      return aliases.of(t);
    });
    if (value.isDevice() && value.toDevice().is_cuda()) {
      if (where < 0) where = value.toDevice().index();
      value = Device(DeviceType::CPU);
    }
    const auto& name = schema.arguments()[i - begin].name();
    if (name == "non_blocking" && value.isBool() && value.toBool()) blocking = false;
  }
  const std::string& name = op.operator_name().name;
  if (WAITS.count(name) || (by_mask && name.rfind("aten::index", 0) == 0)) wait(name);
  if (name == "aten::copy_" && from_host && on_device && blocking) wait("copy between host and device");
  if (where < 0) where = current;
  op.callBoxed(stack);
  for (auto& [on_gpu, alias] : aliases.pairs) {  // what was resized in place
    auto* t = on_gpu.unsafeGetTensorImpl();
    if (alias.storage().data() != on_gpu.storage().data() || alias.storage().nbytes() != on_gpu.storage().nbytes())
      t->set_storage_keep_dtype(owned(alias.storage(), where));
    if (alias.sizes() != on_gpu.sizes() || alias.strides() != on_gpu.strides())
      t->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
  }
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i)
    replace((*stack)[i], [&](const at::Tensor& t) {
      if (!t.defined() || t.is_cuda()) return t;
      for (auto& p : aliases.pairs) if (p.second.is_same(t)) return p.first;
      for (auto& h : on_host) if (h.is_same(t)) return t;
      if (t.storage().data() != nullptr)
        for (auto& p : aliases.pairs)
          if (p.second.storage().data() == t.storage().data()) return with_storage(p.first.storage(), t, DispatchKey::CUDA);
      return with_storage(owned(t.storage(), where), t, DispatchKey::CUDA);
    });
}
TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

at::Tensor& set_part(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* t = self.unsafeGetTensorImpl();
  t->set_storage_keep_dtype(source);
  if (stride.size() == size.size() && !size.empty()) t->set_sizes_and_strides(size, stride, offset);
  else { t->set_sizes_contiguous(size); t->set_storage_offset(offset); }
  return self;
}
at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  return set_part(self, source, 0, {(int64_t)(source.nbytes() / self.dtype().itemsize())}, {1});
}
at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_part(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  // Composite by registration, but with a kernel for each device inside.
  for (auto name : {"copy_", "_fused_sdp_choice"}) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// --- for Python ---

void resize_storage(const at::Tensor& t, int64_t bytes) {
  auto* storage = t.storage().unsafeGetStorageImpl();
  if ((int64_t)storage->nbytes() == bytes) return;
  DataPtr data = allocator.allocate(bytes);
  if (auto kept = std::min<size_t>(bytes, storage->nbytes())) std::memcpy(data.get(), storage->data(), kept);
  storage->set_data_ptr_noswap(std::move(data));
  storage->set_nbytes(bytes);
}
at::Tensor cpu_alias(const at::Tensor& t) { return Aliases().of(t.detach()); }
TORCH_LIBRARY(fakecuda, m) {
  m.def("memory() -> int", []() { return in_use_; });
  m.def("peak() -> int", []() { return peak_; });
  m.def("reset_peak() -> ()", []() { peak_ = in_use_; });
  m.def("resize_storage(Tensor t, int n) -> ()");
  m.def("cpu_alias(Tensor t) -> Tensor");
}
TORCH_LIBRARY_IMPL(fakecuda, CompositeImplicitAutograd, m) {
  m.impl("resize_storage", resize_storage);
  m.impl("cpu_alias", cpu_alias);
}
}  // namespace
namespace at { using ::CUDAHooks; C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, CUDAHooks) }

extern "C" void fakecuda_on_wait(void (*f)(const char*)) { on_wait_ = f; }
