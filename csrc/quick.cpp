// The straight path of ordinary calls: checked, laid out and run behind a single binding.
#include <math.h>

#include <vector>

#include "straight.h"

namespace fastgen {

static bool gpu_serves = false;

void serve_gpu(bool serves) { gpu_serves = serves; }

bool is_in_reach(const View& view) {
#if defined(FASTGEN_CUDA)
    if (view.gpu >= 0) return gpu_serves && view.gpu == cuda::current_device();
#endif
    return view.on_cpu;
}

namespace {

// A call whose tensors are all ordinary, on one device, of one shape and a kernel's dtype. Anything
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
        if (count_ > 0 && !is_beside(out, views_[0])) return false;
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

    // Where the output is.
    const View& place() const { return out_; }

    py::object result;

   private:
    bool see(PyObject* tensor, View& view) const {
        return is_ordinary(tensor, grad_) && try_look_at(tensor, view) && view.ndim <= kMaxRank &&
               view.dtype >= 0 && (count_ ? is_beside(view, views_[0]) : is_in_reach(view));
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

}  // namespace

// The dtypes and sizes of ordinary tensors on the CPU, to look up what was found of their like;
// None where one is out of the ordinary.
py::object shapes_of(py::tuple operands, bool grad) {
    std::vector<int64_t> words;
    for (py::handle operand : operands) {
        if (operand.is_none()) {
            words.push_back(-1);
            continue;
        }
        View view;
        if (!is_ordinary(operand.ptr(), grad) || !try_look_at(operand.ptr(), view) ||
            !view.on_cpu || view.dtype < 0)
            return py::none();
        words.push_back(view.dtype);
        words.push_back(view.ndim);
        words.insert(words.end(), view.size, view.size + view.ndim);
    }
    return py::bytes(reinterpret_cast<const char*>(words.data()), 8 * words.size());
}

// operands: (x, cond, uncond, known, logvar, h_0 ... h_6), trailing ones left out; one output.
py::object quick_step(py::handle operands, py::handle noise, py::handle out, py::handle row,
                      double guidance, py::handle seed, int64_t noise_step, py::handle streams,
                      bool grad, int threads) {
    const py::object declined = py::reinterpret_borrow<py::object>(Py_NotImplemented);
    if (!isfinite(float(guidance))) return declined;
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
    FASTGEN_RUN_AT(tensors.place(), step, p, p.draws ? kNoiseGrain : kPlainGrain, threads);
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
        if (!tensors.place().on_cpu) return declined;
        partials.resize(p.shape.batch * ((p.shape.elements + kChunk - 1) / kChunk));
        p.partials = partials.data();
        p.kl = static_cast<float*>(address(kl));
    }
    FASTGEN_RUN_AT(tensors.place(), reparameterize, p, kNoiseGrain, threads);
    return tensors.result;
}

}  // namespace fastgen
