// The only file that knows Python. Tensors are read by the attributes that every torch version has
// (data_ptr, dtype, stride); nothing of torch is compiled in.
#include <pybind11/pybind11.h>

#include <limits>
#include <string>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "layout.h"
#include "math/philox.h"
#if defined(FASTGEN_CUDA)
#include "cuda/launch.h"
#endif

namespace py = pybind11;

namespace fastgen {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kPlainGrain = 32768, kNoiseGrain = 6144;

PyObject* dtypes[3];  // torch.float32, torch.bfloat16, torch.float16
PyObject *name_data_ptr, *name_dtype, *name_stride;

void set_dtypes(py::object float32, py::object bfloat16, py::object float16) {
    dtypes[kFloat32] = float32.release().ptr();
    dtypes[kBFloat16] = bfloat16.release().ptr();
    dtypes[kFloat16] = float16.release().ptr();
}

int64_t as_int(PyObject* value) {
    const long long result = PyLong_AsLongLong(value);
    if (result == -1 && PyErr_Occurred()) throw py::error_already_set();
    return result;
}

void* address(py::handle tensor) {
    if (tensor.is_none()) return nullptr;
    py::object pointer = py::reinterpret_steal<py::object>(
        PyObject_CallMethodNoArgs(tensor.ptr(), name_data_ptr));
    if (!pointer) throw py::error_already_set();
    void* result = PyLong_AsVoidPtr(pointer.ptr());
    if (!result && PyErr_Occurred()) throw py::error_already_set();
    return result;
}

template <typename T>
const T* address_of(py::handle tensor) {
    return static_cast<const T*>(address(tensor));
}

// Collects the tensors of a call with their strides, then lays them all out over one shape.
class Call {
   public:
    explicit Call(py::handle sizes) {
        rank_ = int(PyTuple_GET_SIZE(sizes.ptr()));
        if (rank_ > kMaxRank) throw py::value_error("more dimensions than torch allows");
        for (int dim = 0; dim < rank_; ++dim) size_[dim] = as_int(PyTuple_GET_ITEM(sizes.ptr(), dim));
    }

    void add(Tensor& tensor, py::handle source) {
        tensor.data = nullptr;
        if (source.is_none()) return;
        if (count_ == kMaxTensors) throw py::value_error("too many tensors");
        tensor.data = address(source);
        py::object dtype =
            py::reinterpret_steal<py::object>(PyObject_GetAttr(source.ptr(), name_dtype));
        if (!dtype) throw py::error_already_set();
        int code = 0;
        while (code < 3 && dtypes[code] != dtype.ptr()) ++code;
        if (code == 3) throw py::type_error("float32, bfloat16 or float16 tensors only");
        tensor.dtype = DType(code);
        py::object strides = py::reinterpret_steal<py::object>(
            PyObject_CallMethodNoArgs(source.ptr(), name_stride));
        if (!strides) throw py::error_already_set();
        if (PyTuple_GET_SIZE(strides.ptr()) != rank_) throw py::value_error("rank mismatch");
        int64_t* stride = stride_[count_];
        for (int dim = 0; dim < rank_; ++dim)
            stride[dim] = as_int(PyTuple_GET_ITEM(strides.ptr(), dim));
        tensors_[count_++] = &tensor;
    }

    void add_all(Tensor* tensors, int room, py::handle sources) {
        const int given = int(PyTuple_GET_SIZE(sources.ptr()));
        if (given > room) throw py::value_error("too many tensors");
        for (int i = 0; i < given; ++i) add(tensors[i], PyTuple_GET_ITEM(sources.ptr(), i));
    }

    // ordered: the order of elements matters (noise, reductions); per_sample: the batch does.
    void lay_out(Shape& shape, bool ordered, bool per_sample) {
        if (!coalesce(shape, rank_, size_, count_, stride_, tensors_, ordered, per_sample))
            throw py::value_error("a layout of more than 8 separate dimensions");
    }

   private:
    static constexpr int kMaxTensors = 24;
    int rank_ = 0, count_ = 0;
    int64_t size_[kMaxRank];
    int64_t stride_[kMaxTensors][kMaxRank];
    Tensor* tensors_[kMaxTensors];
};

void read_key(NoiseKey& key, py::handle seed, py::handle sample_ids, py::handle step,
              py::handle step_pointer) {
    if (PyLong_Check(seed.ptr())) {
        key.seed = PyLong_AsUnsignedLongLong(seed.ptr());
        if (PyErr_Occurred()) throw py::error_already_set();
    } else {
        py::tuple pair = py::reinterpret_borrow<py::tuple>(seed);  // (tensor, stride)
        key.seeds = address_of<int64_t>(pair[0]);
        key.seed_stride = as_int(pair[1].ptr());
    }
    if (PyLong_Check(sample_ids.ptr()))
        key.first_sample_id = as_int(sample_ids.ptr());
    else
        key.sample_ids = address_of<int64_t>(sample_ids);
    key.step = uint32_t(as_int(step.ptr()));
    key.step_pointer = address_of<int64_t>(step_pointer);
}

// A float for every sample, or (tensor, stride).
void read_guidance(py::handle guidance, float& scale, const float*& pointer, int64_t& stride) {
    if (PyFloat_Check(guidance.ptr())) {
        scale = float(PyFloat_AS_DOUBLE(guidance.ptr()));
    } else {
        py::tuple pair = py::reinterpret_borrow<py::tuple>(guidance);
        pointer = address_of<float>(pair[0]);
        stride = as_int(pair[1].ptr());
    }
}

#if defined(FASTGEN_CUDA)
template <typename Params>
void run_cuda(int (*launch)(const Params&, void*), const Params& params, int64_t stream) {
    const int error = launch(params, reinterpret_cast<void*>(stream));
    if (error) throw std::runtime_error(std::string("CUDA: ") + cuda::error_string(error));
}
#define FASTGEN_RUN(op, params, cost)                                          \
    if (!stream.is_none()) {                                                   \
        run_cuda(cuda::op, params, as_int(stream.ptr()));                      \
        return;                                                                \
    }                                                                          \
    run_cpu(cpu_kernels().op, params, cost, threads)
#else
#define FASTGEN_RUN(op, params, cost)                                          \
    if (!stream.is_none()) throw std::runtime_error("built without CUDA");     \
    run_cpu(cpu_kernels().op, params, cost, threads)
#endif

template <typename Params>
void run_cpu(void (*kernel)(const Params&, int), const Params& params, int64_t grain, int threads) {
    if (params.shape.batch * params.shape.elements < grain) threads = 1;
    py::gil_scoped_release release;
    kernel(params, threads);
}

void step(py::handle shape, py::handle x, py::handle cond, py::handle uncond, py::handle known,
          py::handle logvar, py::handle history, py::handle given_noise, py::handle out,
          py::handle row, py::handle rows, py::handle row_pointer, py::handle guidance,
          py::handle output_scale, py::handle seed, py::handle sample_ids, py::handle noise_step,
          py::handle streams, int threads, py::handle stream) {
    StepParams p{};
    Call call(shape);
    call.add_all(p.out, kOutputs, out);
    call.add(p.x, x);
    call.add(p.cond, cond);
    call.add(p.uncond, uncond);
    call.add(p.known, known);
    call.add(p.logvar, logvar);
    call.add_all(p.history, kHistory, history);
    call.add_all(p.given_noise, kNoises, given_noise);
    bool per_sample = !output_scale.is_none();
    if (PyBytes_Check(row.ptr())) {
        if (PyBytes_GET_SIZE(row.ptr()) != sizeof(StepRow)) throw py::value_error("row size");
        memcpy(&p.row, PyBytes_AS_STRING(row.ptr()), sizeof(StepRow));
    } else {
        p.rows = address_of<StepRow>(rows);
        p.row_stride = as_int(row.ptr());
        p.row_pointer = address_of<int64_t>(row_pointer);
        per_sample |= p.row_stride != 0;
    }
    read_guidance(guidance, p.guidance_scale, p.guidance, p.guidance_stride);
    per_sample |= p.guidance && p.guidance_stride != 0;
    p.output_scale = address_of<float>(output_scale);
    const bool draws = !seed.is_none();
    p.draws = draws;
    if (draws) {
        read_key(p.key, seed, sample_ids, noise_step, row_pointer);
        for (int m = 0; m < int(PyTuple_GET_SIZE(streams.ptr())) && m < kNoises; ++m)
            p.stream[m] = int32_t(as_int(PyTuple_GET_ITEM(streams.ptr(), m)));
    }
    call.lay_out(p.shape, draws, draws || per_sample);
    FASTGEN_RUN(step, p, draws ? kNoiseGrain : kPlainGrain);
}

void reparameterize(py::handle shape, py::handle mean, py::handle logvar, py::handle noise,
                    py::handle out, py::handle kl, py::handle partials, py::tuple clamp,
                    py::handle seed, py::handle sample_ids, py::handle noise_step, int noise_stream,
                    int threads, py::handle stream) {
    ReparameterizeParams p{};
    Call call(shape);
    call.add(p.out, out);
    call.add(p.mean, mean);
    call.add(p.logvar, logvar);
    call.add(p.given_noise, noise);
    p.clamp_low = clamp[0].cast<float>();
    p.clamp_high = clamp[1].cast<float>();
    p.kl = static_cast<float*>(address(kl));
    p.partials = static_cast<float*>(address(partials));
    if (!seed.is_none()) read_key(p.key, seed, sample_ids, noise_step, py::none());
    p.stream = noise_stream;
    call.lay_out(p.shape, true, true);
    FASTGEN_RUN(reparameterize, p, kNoiseGrain);
}

void reparameterize_backward(py::handle shape, py::handle mean, py::handle logvar,
                             py::handle noise, py::handle grad_out, py::handle grad_kl,
                             py::handle grad_mean, py::handle grad_logvar, py::handle grad_noise,
                             py::tuple clamp, py::handle seed, py::handle sample_ids,
                             py::handle noise_step, int noise_stream, int threads,
                             py::handle stream) {
    ReparameterizeParams p{};
    Call call(shape);
    call.add(p.mean, mean);
    call.add(p.logvar, logvar);
    call.add(p.given_noise, noise);
    call.add(p.grad_out, grad_out);
    call.add(p.grad_mean, grad_mean);
    call.add(p.grad_logvar, grad_logvar);
    call.add(p.grad_noise, grad_noise);
    p.grad_kl = address_of<float>(grad_kl);
    p.clamp_low = clamp[0].cast<float>();
    p.clamp_high = clamp[1].cast<float>();
    if (!seed.is_none()) read_key(p.key, seed, sample_ids, noise_step, py::none());
    p.stream = noise_stream;
    call.lay_out(p.shape, true, true);
    FASTGEN_RUN(reparameterize_backward, p, kNoiseGrain);
}

void rescale(py::handle shape, py::handle cond, py::handle uncond, py::handle guidance,
             double factor, py::handle partials, py::handle scale, int threads,
             py::handle stream) {
    RescaleParams p{};
    Call call(shape);
    call.add(p.cond, cond);
    call.add(p.uncond, uncond);
    read_guidance(guidance, p.guidance_scale, p.guidance, p.guidance_stride);
    p.rescale = float(factor);
    p.partials = static_cast<float*>(address(partials));
    p.scale = static_cast<float*>(address(scale));
    call.lay_out(p.shape, true, true);
    FASTGEN_RUN(rescale, p, kPlainGrain);
}

py::tuple philox(py::tuple counter, py::tuple key) {
    uint32_t c[4];
    for (int i = 0; i < 4; ++i) c[i] = counter[i].cast<uint32_t>();
    baseline::philox4x32(c, key[0].cast<uint32_t>(), key[1].cast<uint32_t>());
    return py::make_tuple(c[0], c[1], c[2], c[3]);
}

py::tuple available_isas() {
    py::list names;
    for (const char* isa : {"baseline", "avx2", "avx512"})
        if (has_cpu_kernels(isa)) names.append(isa);
    return py::tuple(names);
}

}  // namespace
}  // namespace fastgen

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
    using namespace fastgen;
    name_data_ptr = PyUnicode_InternFromString("data_ptr");
    name_dtype = PyUnicode_InternFromString("dtype");
    name_stride = PyUnicode_InternFromString("stride");
    m.def("set_dtypes", &set_dtypes);
    m.def("step", &step);
    m.def("reparameterize", &reparameterize);
    m.def("reparameterize_backward", &reparameterize_backward);
    m.def("rescale", &rescale);
    m.def("philox4x32", &philox);
    m.def("isa", [] { return cpu_kernels().isa; });
    m.def("available_isas", &available_isas);
    m.def("choose_isa", [](const char* isa) {
        if (!choose_cpu_kernels(isa))
            throw py::value_error(std::string("isa: this processor or build lacks ") + isa);
    });
    m.def("parallel_runtime", &parallel_runtime);
#if defined(FASTGEN_CUDA)
    m.attr("cuda_architectures") = FASTGEN_CUDA;
#else
    m.attr("cuda_architectures") = "";
#endif
    m.attr("version") = FASTGEN_VERSION;
}
