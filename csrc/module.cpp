// The Python bindings: arguments in, a params struct out to a kernel. With view.h, the only files
// that know Python; nothing of torch is compiled in.
#include <pybind11/pybind11.h>

#include <cmath>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "math/philox.h"
#include "view.h"
#if defined(FASTGEN_CUDA)
#include "cuda/launch.h"
#endif

namespace fastgen {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kPlainGrain = 32768, kNoiseGrain = 6144;

int64_t as_int(PyObject* value) {
    const long long result = PyLong_AsLongLong(value);
    if (result == -1 && PyErr_Occurred()) throw py::error_already_set();
    return result;
}

void* address(py::handle tensor) {
    if (tensor.is_none()) return nullptr;
    View view;
    look_at(tensor.ptr(), view);
    return view.data;
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
        for (int dim = 0; dim < rank_; ++dim)
            size_[dim] = as_int(PyTuple_GET_ITEM(sizes.ptr(), dim));
    }

    explicit Call(const View& view) : rank_(view.ndim) {
        for (int dim = 0; dim < rank_; ++dim) size_[dim] = view.size[dim];
    }

    void add(Tensor& tensor, py::handle source) {
        if (source.is_none()) return;
        View view;
        look_at(source.ptr(), view);
        add(tensor, view);
    }

    void add(Tensor& tensor, const View& view) {
        if (count_ == kMaxTensors) throw py::value_error("too many tensors");
        if (view.dtype < 0) throw py::type_error("float32, bfloat16 or float16 tensors only");
        if (view.ndim != rank_) throw py::value_error("rank mismatch");
        tensor.data = view.data;
        tensor.dtype = DType(view.dtype);
        for (int dim = 0; dim < rank_; ++dim) stride_[count_][dim] = view.stride[dim];
        tensors_[count_++] = &tensor;
    }

    void add_all(Tensor* tensors, int room, py::handle sources) {
        const int given = int(PyTuple_GET_SIZE(sources.ptr()));
        if (given > room) throw py::value_error("too many tensors");
        for (int i = 0; i < given; ++i) add(tensors[i], PyTuple_GET_ITEM(sources.ptr(), i));
    }

    // ordered: the order of elements matters (noise, reductions); per_sample: the batch does.
    bool try_lay_out(Shape& shape, bool ordered, bool per_sample) {
        return coalesce(shape, rank_, size_, count_, stride_, tensors_, ordered, per_sample);
    }

    void lay_out(Shape& shape, bool ordered, bool per_sample) {
        if (!try_lay_out(shape, ordered, per_sample))
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
#define FASTGEN_RUN(op, params, cost)                     \
    if (!stream.is_none()) {                              \
        run_cuda(cuda::op, params, as_int(stream.ptr())); \
        return;                                           \
    }                                                     \
    run_cpu(cpu_kernels().op, params, cost, threads)
#else
#define FASTGEN_RUN(op, params, cost)                                      \
    if (!stream.is_none()) throw std::runtime_error("built without CUDA"); \
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

// ---- the straight path -------------------------------------------------------------------------
// A call whose tensors are all ordinary, on the CPU, of one shape and a kernel's dtype. Anything
// else is NotImplemented: the general path, in Python, then serves it or says what is wrong.

class Ordinary {
   public:
    explicit Ordinary(bool grad) : grad_(grad) {}

    // False, from then on, once a tensor is out of the ordinary. None is passed over.
    bool add(Tensor* slot, PyObject* tensor) {
        if (tensor == Py_None) return true;
        if (count_ == kRoom || !see(tensor, views_[count_])) return false;
        if (views_[count_].ndim == 0 || !views_[count_].has_size_of(views_[0])) return false;
        if (count_ == 0) first_ = tensor;
        slots_[count_++] = slot;
        return true;
    }

    // The tensor to write: made like the first one, or the one given where that may be written: of
    // the first one's dtype, contiguous, each operand in the same place or apart from it.
    bool add_out(PyObject* given) {
        View& out = out_;
        if (given == Py_None) {
            if (!first_) return false;
            result = new_like(first_);
            look_at(result.ptr(), out);
            return true;
        }
        const bool kept = grad_;
        grad_ = true;  // an output must not require a gradient, recorded or not
        const bool ordinary = see(given, out);
        grad_ = kept;
        if (!ordinary || out.ndim == 0 || !out.is_contiguous()) return false;
        const char* begin = static_cast<const char*>(out.data);
        const char* end = begin + 4 * out.elements();  // no dtype is wider
        for (int i = 0; i < count_; ++i) {
            const View& view = views_[i];
            if (i == 0 && view.dtype != out.dtype) return false;
            if (!view.has_size_of(out)) return false;
            if (view.is_contiguous() && view.data == out.data && view.dtype == out.dtype) continue;
            const char* other = static_cast<const char*>(view.data);
            if (!view.is_contiguous() || (other < end && begin < other + 4 * view.elements()))
                return false;
        }
        result = py::reinterpret_borrow<py::object>(given);
        return true;
    }

    // Lays everything out over the output's shape, the output first.
    // False where they take more separate dims than a kernel walks.
    bool lay_out(Shape& shape, Tensor& out, bool ordered, bool per_sample) {
        Call call(out_);
        call.add(out, out_);
        for (int i = 0; i < count_; ++i) call.add(*slots_[i], views_[i]);
        return call.try_lay_out(shape, ordered, per_sample);
    }

    py::object result;

   private:
    bool see(PyObject* tensor, View& view) const {
        return is_ordinary(tensor, grad_) && try_look_at(tensor, view) && view.ndim <= kMaxRank &&
               view.on_cpu && view.dtype >= 0;
    }

    static constexpr int kRoom = 16;
    bool grad_;
    int count_ = 0;
    PyObject* first_ = nullptr;
    View views_[kRoom], out_;
    Tensor* slots_[kRoom];
};

// The key of a call without sample ids: one seed, and the slots as ids.
void read_plain_key(NoiseKey& key, py::handle seed, int64_t step) {
    key.seed = PyLong_AsUnsignedLongLong(seed.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    key.step = uint32_t(step);
}

// operands: (x, cond, uncond, known, logvar, h_0 ... h_6), trailing ones left out; one output.
py::object quick_step(py::handle operands, py::handle noise, py::handle out, py::handle row,
                      double guidance, py::handle seed, int64_t noise_step, py::handle streams,
                      bool grad, int threads) {
    const py::object declined = py::reinterpret_borrow<py::object>(Py_NotImplemented);
    if (!std::isfinite(float(guidance))) return declined;
    StepParams p{};
    Tensor* const slots[] = {&p.x, &p.cond, &p.uncond, &p.known, &p.logvar};
    Ordinary tensors(grad);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(operands.ptr()); ++i)
        if (!tensors.add(i < 5 ? slots[i] : &p.history[i - 5], PyTuple_GET_ITEM(operands.ptr(), i)))
            return declined;
    if (!tensors.add(&p.given_noise[0], noise.ptr()) || !tensors.add_out(out.ptr()))
        return declined;
    memcpy(&p.row, PyBytes_AS_STRING(row.ptr()), sizeof(StepRow));
    p.guidance_scale = float(guidance);
    p.fresh = out.is_none();
    p.draws = !seed.is_none();
    if (p.draws) {
        read_plain_key(p.key, seed, noise_step);
        for (int m = 0; m < int(PyTuple_GET_SIZE(streams.ptr())) && m < kNoises; ++m)
            p.stream[m] = int32_t(as_int(PyTuple_GET_ITEM(streams.ptr(), m)));
    }
    if (!tensors.lay_out(p.shape, p.out[0], p.draws, p.draws)) return declined;
    if (p.draws && p.shape.elements > kMaxNoiseElements) return declined;
    run_cpu(cpu_kernels().step, p, p.draws ? kNoiseGrain : kPlainGrain, threads);
    return tensors.result;
}

// As quick_step: z, or NotImplemented. kl: None, or where the divergences go.
py::object quick_reparameterize(py::handle mean, py::handle logvar, py::handle noise,
                                py::handle out, py::handle kl, py::handle seed, int64_t noise_step,
                                int noise_stream, bool grad, int threads) {
    const py::object declined = py::reinterpret_borrow<py::object>(Py_NotImplemented);
    if (mean.is_none() || logvar.is_none()) return declined;
    ReparameterizeParams p{};
    Ordinary tensors(grad);
    if (!tensors.add(&p.mean, mean.ptr()) || !tensors.add(&p.logvar, logvar.ptr()) ||
        !tensors.add(&p.given_noise, noise.ptr()) || !tensors.add_out(out.ptr()))
        return declined;
    p.clamp_low = -INFINITY;
    p.clamp_high = INFINITY;
    if (!seed.is_none()) read_plain_key(p.key, seed, noise_step);
    p.stream = noise_stream;
    if (!tensors.lay_out(p.shape, p.out, true, true)) return declined;
    if (p.shape.elements > kMaxNoiseElements) return declined;
    std::vector<float> partials;
    if (!kl.is_none()) {
        partials.resize(p.shape.batch * ((p.shape.elements + kChunk - 1) / kChunk));
        p.partials = partials.data();
        p.kl = static_cast<float*>(address(kl));
    }
    run_cpu(cpu_kernels().reparameterize, p, kNoiseGrain, threads);
    return tensors.result;
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

void reparameterize_backward(py::handle shape, py::handle mean, py::handle logvar, py::handle noise,
                             py::handle grad_out, py::handle grad_kl, py::handle grad_mean,
                             py::handle grad_logvar, py::handle grad_noise, py::tuple clamp,
                             py::handle seed, py::handle sample_ids, py::handle noise_step,
                             int noise_stream, int threads, py::handle stream) {
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
             double factor, py::handle partials, py::handle scale, int threads, py::handle stream) {
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

// ---- conv_transpose
// ------------------------------------------------------------------------------

// The dtype and place alone.
void read_tensor(Tensor& tensor, py::handle source, View& view) {
    look_at(source.ptr(), view);
    if (view.dtype < 0) throw py::type_error("float32, bfloat16 or float16 tensors only");
    tensor.data = view.data;
    tensor.dtype = DType(view.dtype);
}

Epilogue read_epilogue(py::handle bias, py::handle scale, py::handle shift, int activation,
                       double negative_slope) {
    if (activation < kIdentity || activation > kGelu) throw py::value_error("activation");
    return {address_of<float>(bias), address_of<float>(scale), address_of<float>(shift),
            Activation(activation), float(negative_slope)};
}

// Dense: weight (depth, rows), input (batch, depth, columns), out (batch, rows, columns).
void conv_transpose_product(py::handle weight, py::handle input, py::handle out, int64_t batch,
                            int64_t depth, int64_t rows, int64_t columns, int threads) {
    if (columns != 1 && columns % 16 != 0)
        throw py::value_error("columns: one, or a multiple of 16");
    const ProductParams p{address_of<float>(weight),
                          address_of<float>(input),
                          static_cast<float*>(address(out)),
                          batch,
                          depth,
                          rows,
                          columns};
    const int64_t products = batch * depth * rows * columns;
    py::gil_scoped_release release;
    cpu_kernels().conv_transpose_product(p, products < 4 * kPlainGrain ? 1 : threads);
}

// columns: (batch, channels, taps, inputs) by `strides` of the first three; out: (B, C, [D, [H,]]
// W). geometry: three values, depth first, of each of input, output, kernel, stride, padding,
// dilation.
void conv_transpose_fold(py::handle columns, py::tuple strides, py::handle out, int64_t batch,
                         int64_t channels, py::tuple geometry, py::handle bias, py::handle scale,
                         py::handle shift, int activation, double negative_slope, int threads) {
    FoldParams p{};
    p.columns = address_of<float>(columns);
    p.sample_stride = strides[0].cast<int64_t>();
    p.channel_stride = strides[1].cast<int64_t>();
    p.tap_stride = strides[2].cast<int64_t>();
    View view;
    read_tensor(p.out, out, view);
    const int missing = 5 - view.ndim;
    if (missing < 0 || missing > 2) throw py::value_error("out: three to five dimensions");
    p.out.batch_stride = view.stride[0];
    p.out.stride[0] = view.stride[1];
    for (int dim = missing; dim < 3; ++dim) p.out.stride[1 + dim] = view.stride[2 + dim - missing];
    p.batch = batch;
    p.channels = channels;
    int64_t* groups[] = {p.in_size, p.out_size, p.kernel, p.stride, p.padding, p.dilation};
    if (geometry.size() != 18) throw py::value_error("geometry: eighteen numbers");
    for (int i = 0; i < 18; ++i) groups[i / 3][i % 3] = geometry[i].cast<int64_t>();
    p.epilogue = read_epilogue(bias, scale, shift, activation, negative_slope);
    const int64_t elements = batch * channels * p.out_size[0] * p.out_size[1] * p.out_size[2];
    py::gil_scoped_release release;
    cpu_kernels().conv_transpose_fold(p, elements < kPlainGrain ? 1 : threads);
}

void channel_epilogue(py::handle in, py::handle out, int64_t outer, int64_t channels, int64_t inner,
                      py::handle bias, py::handle scale, py::handle shift, int activation,
                      double negative_slope, int threads) {
    ChannelEpilogueParams p{};
    View view;
    read_tensor(p.in, in, view);
    read_tensor(p.out, out, view);
    p.outer = outer;
    p.channels = channels;
    p.inner = inner;
    p.epilogue = read_epilogue(bias, scale, shift, activation, negative_slope);
    py::gil_scoped_release release;
    cpu_kernels().channel_epilogue(p, outer * channels * inner < kPlainGrain ? 1 : threads);
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

namespace py = pybind11;

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
    using namespace fastgen;
    m.def("set_torch", &set_torch);
    m.def("use_huge_pages", [](py::handle tensor) { use_huge_pages(tensor.ptr()); });
    m.def("quick_step", &quick_step);
    m.def("quick_reparameterize", &quick_reparameterize);
    m.def("step", &step);
    m.def("reparameterize", &reparameterize);
    m.def("reparameterize_backward", &reparameterize_backward);
    m.def("rescale", &rescale);
    m.def("conv_transpose_product", &conv_transpose_product);
    m.def("conv_transpose_fold", &conv_transpose_fold);
    m.def("channel_epilogue", &channel_epilogue);
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
    m.def("cuda_refusal", [] {  // why the current device cannot run the kernels, or ""
        const int error = cuda::probe();
        return error ? cuda::error_string(error) : "";
    });
#else
    m.attr("cuda_architectures") = "";
#endif
    m.attr("version") = FASTGEN_VERSION;
}
