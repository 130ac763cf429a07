// From a call's Python arguments to a params struct and its kernel, for the bindings.
#pragma once

#include <string>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "view.h"
#if defined(FASTGEN_CUDA)
#include "cuda/launch.h"
#endif

namespace fastgen {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kPlainGrain = 32768, kNoiseGrain = 6144;

inline int64_t as_int(PyObject* value) {
    const long long result = PyLong_AsLongLong(value);
    if (result == -1 && PyErr_Occurred()) throw py::error_already_set();
    return result;
}

inline void* address(py::handle tensor) {
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

inline void read_key(NoiseKey& key, py::handle seed, py::handle sample_ids, py::handle step,
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
inline void read_guidance(py::handle guidance, float& scale, const float*& pointer,
                          int64_t& stride) {
    if (PyFloat_Check(guidance.ptr())) {
        scale = float(PyFloat_AS_DOUBLE(guidance.ptr()));
    } else {
        py::tuple pair = py::reinterpret_borrow<py::tuple>(guidance);
        pointer = address_of<float>(pair[0]);
        stride = as_int(pair[1].ptr());
    }
}

template <typename Params>
void run_cpu(void (*kernel)(const Params&, int), const Params& params, int64_t grain, int threads) {
    const int64_t elements = params.shape.batch * params.shape.elements;
    if (elements < kNoiseGrain) return kernel(params, 1);  // sooner than another thread could start
    if (elements < grain) threads = 1;
    py::gil_scoped_release release;
    kernel(params, threads);
}

#if defined(FASTGEN_CUDA)
template <typename Params>
void run_cuda(int (*launch)(const Params&, void*), const Params& params, void* stream) {
    const int error = launch(params, stream);
    if (error) throw std::runtime_error(std::string("CUDA: ") + cuda::error_string(error));
}
#endif

// The straight paths, in quick.cpp and scheduler.cpp. Of tensors on a GPU it declines all until it
// is told that the kernels run there.
void serve_gpu(bool serves);
py::object shapes_of(py::tuple operands, bool grad);
py::object quick_step(py::handle operands, py::handle noise, py::handle out, py::handle row,
                      double guidance, py::handle seed, int64_t noise_step, py::handle streams,
                      bool grad, int threads);
bool loop_step(py::handle x, py::handle output, py::handle uncond, py::handle noise,
               py::handle history, py::handle outs, py::handle row, py::handle guidance,
               py::handle seed, py::handle sample_ids, py::handle noise_step, py::handle streams,
               bool guided, int threads);
py::object scheduler_step(PyObject* const* args);
py::object scheduler_step_under_way(PyObject* const* args);
py::object quick_reparameterize(py::handle mean, py::handle logvar, py::handle noise,
                                py::handle out, py::handle kl, py::handle seed, int64_t noise_step,
                                int noise_stream, bool grad, int threads);

}  // namespace fastgen
