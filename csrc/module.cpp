// The Python bindings: arguments in, a params struct out to a kernel. With call.h, quick.cpp,
// scheduler.cpp and view.h the only files that know Python; nothing of torch is compiled in.
#include <pybind11/pybind11.h>

#include <string>

#include "call.h"
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
