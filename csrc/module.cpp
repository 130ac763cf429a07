// The Python bindings: arguments in, a params struct out to a kernel. With call.h, quick.cpp,
// scheduler.cpp and view.h the only files that know Python; nothing of torch is compiled in.
#include <pybind11/pybind11.h>

#include <string>

#include "call.h"
#include "cpu/phases.h"
#include "math/philox.h"

namespace fastgen {
namespace {

#if defined(FASTGEN_CUDA)
#define FASTGEN_RUN(op, params, cost)                                              \
    if (!stream.is_none()) {                                                       \
        run_cuda(cuda::op, params, reinterpret_cast<void*>(as_int(stream.ptr()))); \
        return;                                                                    \
    }                                                                              \
    run_cpu(cpu_kernels().op, params, cost, threads)
#else
#define FASTGEN_RUN(op, params, cost)                                      \
    if (!stream.is_none()) throw std::runtime_error("built without CUDA"); \
    run_cpu(cpu_kernels().op, params, cost, threads)
#endif

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

// ---- conv_transpose ----------------------------------------------------------------------------

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

constexpr double kProductGrain = 1 << 18;  // multiplications below which a second thread costs more

// geometry: three values, depth first, of each of input, output, kernel, stride, padding, dilation;
// groups, and the input and output channels of one; whether the output is planar.
ConvTransposeGeometry read_geometry(py::tuple values) {
    ConvTransposeGeometry g{};
    int64_t* fields[] = {g.in_size, g.out_size, g.kernel, g.stride, g.padding, g.dilation};
    if (values.size() != 22) throw py::value_error("geometry: twenty-two numbers");
    for (int i = 0; i < 18; ++i) fields[i / 3][i % 3] = as_int(PyTuple_GET_ITEM(values.ptr(), i));
    g.groups = as_int(PyTuple_GET_ITEM(values.ptr(), 18));
    g.in_channels = as_int(PyTuple_GET_ITEM(values.ptr(), 19));
    g.out_channels = as_int(PyTuple_GET_ITEM(values.ptr(), 20));
    g.planar = as_int(PyTuple_GET_ITEM(values.ptr(), 21));
    return g;
}

// (channels, [depth, [height,]] width) behind `outer` dims, as four strides.
void read_strides(const View& view, int outer, int64_t* stride) {
    const int missing = 3 + outer - view.ndim;
    if (missing < 0 || missing > 2) throw py::value_error("three to five dimensions");
    for (int dim = 0; dim < 3; ++dim)
        stride[dim] = dim < missing ? 0 : view.stride[outer + dim - missing];
}

struct ConvTransposeLayout : Phases {
    ConvTransposeLayout(py::tuple geometry, int dtype)
        : Phases(phases_of(read_geometry(geometry), dtype == kBFloat16
                                                        ? *cpu_kernels().multiplier_bf16
                                                        : *cpu_kernels().multiplier)) {}

    int64_t bytes() const {
        return geometry.groups * weights * (multiplier->operands == Operands::kFloats ? 4 : 2);
    }
};

// (C_in, C_out, [D, [H,]] W).
void read_weight(Tensor& tensor, py::handle source) {
    View view;
    read_tensor(tensor, source, view);
    tensor.stride[0] = view.stride[0];
    tensor.stride[1] = view.stride[1];
    read_strides(view, 2, tensor.stride + 2);
}

void conv_transpose_pack(py::handle weight, py::handle packed, const ConvTransposeLayout& layout,
                         int threads) {
    PackParams p{};
    read_weight(p.weight, weight);
    p.packed = address(packed);
    p.phases = &layout;
    py::gil_scoped_release release;
    cpu_kernels().conv_transpose_pack(p, threads);
}

// A number that is another one where the tensor has moved or changed: of all numbers of a small
// one, of a thousand of a large one.
uint64_t fingerprint(py::handle tensor) {
    constexpr int64_t kMost = 1024;
    View view;
    look_at(tensor.ptr(), view);
    const int64_t elements = view.elements(), size = view.dtype == kFloat32 ? 4 : 2;
    const int64_t most = elements < kMost ? elements : kMost;
    int64_t reach = 1;
    for (int dim = 0; dim < view.ndim; ++dim) reach += (view.size[dim] - 1) * view.stride[dim];
    const bool dense = reach == elements;  // then their order does not matter
    const char* data = static_cast<const char*>(view.data);
    uint64_t digest[4] = {uint64_t(reinterpret_cast<uintptr_t>(data)), 1, 2, 3};
    for (int dim = 0; dim < view.ndim; ++dim)
        for (int64_t value : {view.size[dim], view.stride[dim]})
            digest[dim % 4] = (digest[dim % 4] ^ uint64_t(value)) * 0x9E3779B97F4A7C15u;
    for (int64_t i = 0; i < most; ++i) {
        int64_t rest = elements / most * i + i % (elements / most), offset = dense ? rest : 0;
        for (int dim = view.ndim - 1; dim >= 0 && !dense; --dim) {
            offset += rest % view.size[dim] * view.stride[dim];
            rest /= view.size[dim];
        }
        uint32_t bits = 0;
        memcpy(&bits, data + offset * size, size);
        digest[i % 4] = (digest[i % 4] ^ bits) * 0x9E3779B97F4A7C15u;
    }
    return (digest[0] ^ digest[1] >> 7) * 31 + (digest[2] ^ digest[3] >> 9);
}

// (B, C, [D, [H,]] W); how many there are.
int64_t read_images(Tensor& tensor, py::handle source) {
    View view;
    read_tensor(tensor, source, view);
    tensor.batch_stride = view.stride[0];
    tensor.stride[0] = view.stride[1];
    read_strides(view, 2, tensor.stride + 1);
    return view.size[0];
}

void conv_transpose(py::handle in, py::handle packed, py::handle out,
                    const ConvTransposeLayout& layout, py::handle bias, py::handle scale,
                    py::handle shift, int activation, double negative_slope, int threads) {
    ConvTransposeParams p{};
    read_images(p.in, in);
    p.batch = read_images(p.out, out);
    p.weight = address(packed);
    p.phases = &layout;
    p.epilogue = read_epilogue(bias, scale, shift, activation, negative_slope);
    if (double(p.batch) * multiplications(layout) < kProductGrain) threads = 1;
    py::gil_scoped_release release;
    cpu_kernels().conv_transpose(p, threads);
}

// The CUDA kernel for few channels a group; `threads` is there for the epilogue's order of
// arguments.
void conv_transpose_direct(py::handle in, py::handle weight, py::handle out, py::tuple geometry,
                           py::handle bias, py::handle scale, py::handle shift, int activation,
                           double negative_slope, int, [[maybe_unused]] py::handle stream) {
    DirectConvTransposeParams p{};
    read_weight(p.weight, weight);
    read_images(p.in, in);
    p.batch = read_images(p.out, out);
    p.geometry = read_geometry(geometry);
    p.epilogue = read_epilogue(bias, scale, shift, activation, negative_slope);
#if defined(FASTGEN_CUDA)
    run_cuda(cuda::conv_transpose, p, reinterpret_cast<void*>(as_int(stream.ptr())));
#else
    throw std::runtime_error("built without CUDA");
#endif
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

py::object eager(PyObject* const*) { return py::bool_(is_eager()); }

// A function of so many positional arguments without pybind11, whose reading of them takes a good
// part of a small step.
template <py::object (*Function)(PyObject* const*), Py_ssize_t Count>
PyObject* run_bare(PyObject*, PyObject* const* args, Py_ssize_t count) {
    try {
        if (count != Count) throw py::type_error("a call with another number of arguments");
        return Function(args).release().ptr();
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::builtin_exception& error) {
        error.set_error();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

template <py::object (*Function)(PyObject* const*), Py_ssize_t Count>
PyMethodDef bare_method(const char* name) {
    auto* run = reinterpret_cast<void*>(&run_bare<Function, Count>);
    return {name, reinterpret_cast<PyCFunction>(run), METH_FASTCALL, nullptr};
}

py::tuple available_isas() {
    py::list names;
    for (const char* isa : {"baseline", "avx2", "avx512", "avx512_bf16", "amx"})
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
    m.def("serve_gpu", &serve_gpu);
    m.def("shapes_of", &shapes_of);
    m.def("quick_step", &quick_step);
    m.def("loop_step", &loop_step);
    static PyMethodDef bare[] = {
        bare_method<scheduler_step, 9>("scheduler_step"),
        bare_method<scheduler_step_under_way, 8>("scheduler_step_under_way"),
        bare_method<eager, 0>("is_eager"),
        {nullptr, nullptr, 0, nullptr}};
    if (PyModule_AddFunctions(m.ptr(), bare) != 0) throw py::error_already_set();
    m.def("quick_reparameterize", &quick_reparameterize);
    m.def("step", &step);
    m.def("reparameterize", &reparameterize);
    m.def("reparameterize_backward", &reparameterize_backward);
    m.def("rescale", &rescale);
    py::class_<ConvTransposeLayout>(m, "ConvTransposeLayout", py::module_local())
        .def(py::init<py::tuple, int>())
        .def_property_readonly("bytes", &ConvTransposeLayout::bytes)
        .def_readonly("digest", &ConvTransposeLayout::digest);
    m.def("conv_transpose_pack", &conv_transpose_pack);
    m.def("conv_transpose", &conv_transpose);
    m.def("conv_transpose_direct", &conv_transpose_direct);
    m.def("fingerprint", &fingerprint);
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
