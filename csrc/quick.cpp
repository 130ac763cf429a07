// The straight path of small calls: checked, laid out and run behind a single binding.
#include <math.h>

#include <algorithm>
#include <vector>

#include "call.h"

namespace fastgen {
namespace {

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
    run_cpu(cpu_kernels().step, p, p.draws ? kNoiseGrain : kPlainGrain, threads);
    return tensors.result;
}

namespace {

// Whether both are the same elements in the same places; a dim of one has a stride in name only.
bool is_same(const View& a, const View& b) {
    if (a.data != b.data || a.dtype != b.dtype) return false;
    for (int dim = 0; dim < a.ndim; ++dim)
        if (a.size[dim] != 1 && a.stride[dim] != b.stride[dim]) return false;
    return true;
}

const char* end_of(const View& view) {
    int64_t reach = 1;
    for (int dim = 0; dim < view.ndim; ++dim) {
        if (view.size[dim] == 0) return static_cast<const char*>(view.data);
        reach += (view.size[dim] - 1) * view.stride[dim];
    }
    return static_cast<const char*>(view.data) + reach * (view.dtype == kFloat32 ? 4 : 2);
}

// Whether writing one may change what is still to be read of the other.
bool may_spoil(const View& out, const View& given) {
    return given.data < end_of(out) && out.data < end_of(given) && !is_same(out, given);
}

// The tensors of a step of a Loop or a scheduler: looked at once, then laid out and run. Each add
// is false where a tensor is out of the ordinary.
class StepCall {
   public:
    explicit StepCall(bool grad) : grad_(grad) {}

    StepParams p{};

    // Of the shape of the first, which is x.
    bool add(Tensor& slot, PyObject* tensor) {
        return is_ordinary(tensor, grad_) && add_own(slot, tensor);
    }

    // A tensor that was just made.
    bool add_own(Tensor& slot, PyObject* tensor) {
        View& view = views_[count_];
        slots_[count_] = &slot;
        return try_look_at(tensor, view) && view.on_cpu && view.dtype >= 0 &&
               view.ndim <= kMaxRank && (count_++ == 0 || view.has_size_of(views_[0]));
    }

    // [uncond, cond] in one tensor of twice the batch.
    bool add_both(PyObject* output) {
        const int64_t batch = views_[0].ndim ? views_[0].size[0] : 0;
        View& both = views_[count_];
        slots_[count_++] = &p.uncond;
        if (batch == 0 || !is_ordinary(output, grad_) || !try_look_at(output, both) ||
            !both.on_cpu || both.dtype < 0 || both.ndim != views_[0].ndim)
            return false;
        int64_t doubled[kMaxRank];
        std::copy(views_[0].size, views_[0].size + both.ndim, doubled);
        doubled[0] *= 2;
        if (!std::equal(doubled, doubled + both.ndim, both.size)) return false;
        both.size = views_[0].size;
        View& half = views_[count_];
        slots_[count_++] = &p.cond;
        half.dtype = both.dtype;
        half.ndim = both.ndim;
        half.size = both.size;
        half.stride = both.stride;
        const int64_t bytes = batch * both.stride[0] * (both.dtype == kFloat32 ? 4 : 2);
        half.data = static_cast<char*>(both.data) + bytes;
        return true;
    }

    bool add_noise(py::handle noise) {
        for (int m = 0; m < int(PyTuple_GET_SIZE(noise.ptr())); ++m)
            if (m == kNoises || !add(p.given_noise[m], PyTuple_GET_ITEM(noise.ptr(), m)))
                return false;
        given_ = count_;
        return true;
    }

    bool add_history(py::handle history) {
        for (int k = 0; k < kHistory && k < int(PyTuple_GET_SIZE(history.ptr())); ++k) {
            PyObject* slot = PyTuple_GET_ITEM(history.ptr(), k);
            if (slot != Py_None && !add(p.history[k], slot)) return false;
        }
        return true;
    }

    // Tensors to write, which must share no memory with what the network or the caller gave.
    bool add_outs(py::handle outs) {
        for (int j = 0; j < kOutputs && j < int(PyTuple_GET_SIZE(outs.ptr())); ++j) {
            if (!add(p.out[j], PyTuple_GET_ITEM(outs.ptr(), j))) return false;
            for (int i = 1; i < given_; ++i)
                if (may_spoil(views_[count_ - 1], views_[i])) return false;
        }
        return true;
    }

    // False where the tensors have more separate dims than a kernel walks.
    bool run(py::handle row, py::handle seed, py::handle sample_ids, py::handle noise_step,
             py::handle streams, int threads) {
        memcpy(&p.row, PyBytes_AS_STRING(row.ptr()), sizeof(StepRow));
        p.draws = !seed.is_none();
        if (p.draws) {
            read_key(p.key, seed, sample_ids, noise_step, py::none());
            for (int m = 0; m < kNoises; ++m)
                p.stream[m] = int32_t(as_int(PyTuple_GET_ITEM(streams.ptr(), m)));
        }
        Call call(views_[0]);
        for (int i = 0; i < count_; ++i) call.add(*slots_[i], views_[i]);
        if (!call.try_lay_out(p.shape, p.draws, p.draws || p.guidance)) return false;
        run_cpu(cpu_kernels().step, p, p.draws ? kNoiseGrain : kPlainGrain, threads);
        return true;
    }

    int dtype(int index) const { return views_[index].dtype; }

   private:
    static constexpr int kRoom = 3 + kNoises + kHistory + kOutputs;
    bool grad_;
    int count_ = 0, given_ = 0;
    View views_[kRoom];
    Tensor* slots_[kRoom];
};

}  // namespace

// One step of a Loop, into the tensors given; false, with nothing written, where one is out of the
// ordinary or the network's output shares memory with what is written. guided: the output holds
// two samples of each, [uncond, cond].
bool loop_step(py::handle x, py::handle output, py::handle uncond, py::handle noise,
               py::handle history, py::handle outs, py::handle row, py::handle guidance,
               py::handle seed, py::handle sample_ids, py::handle noise_step, py::handle streams,
               bool guided, int threads) {
    StepCall call(false);
    if (!call.add(call.p.x, x.ptr())) return false;
    if (guided ? !call.add_both(output.ptr())
               : !call.add(call.p.cond, output.ptr()) ||
                     (!uncond.is_none() && !call.add(call.p.uncond, uncond.ptr())))
        return false;
    if (!call.add_noise(noise) || !call.add_history(history) || !call.add_outs(outs)) return false;
    read_guidance(guidance, call.p.guidance_scale, call.p.guidance, call.p.guidance_stride);
    return call.run(row, seed, sample_ids, noise_step, streams, threads);
}

// A scheduler's step: its results, in a tuple of new tensors, or None where a tensor is out of the
// ordinary. dtypes: of each result, a DType or whose it is. grad: whether gradients are recorded.
py::object scheduler_step(py::handle x, py::handle output, py::handle noise, py::handle history,
                          py::handle dtypes, py::handle row, py::handle seed, py::handle sample_ids,
                          py::handle noise_step, py::handle streams, bool grad, int threads) {
    enum { kOfX = 3, kOfOutput = 4, kOfBoth = 5 };
    StepCall call(grad);
    if (!call.add(call.p.x, x.ptr()) || !call.add(call.p.cond, output.ptr()) ||
        !call.add_noise(noise) || !call.add_history(history))
        return py::none();
    const int of_x = call.dtype(0), of_output = call.dtype(1);
    const int count = int(PyTuple_GET_SIZE(dtypes.ptr()));
    py::tuple outs(count);
    for (int j = 0; j < count; ++j) {
        int dtype = int(as_int(PyTuple_GET_ITEM(dtypes.ptr(), j)));
        if (dtype == kOfBoth) dtype = of_x == of_output ? of_x : int(kFloat32);
        if (dtype == kOfX) dtype = of_x;
        if (dtype == kOfOutput) dtype = of_output;
        py::object out = dtype == of_x ? new_like(x.ptr()) : new_like(x.ptr(), dtype);
        if (!call.add_own(call.p.out[j], out.ptr())) return py::none();
        PyTuple_SET_ITEM(outs.ptr(), j, out.release().ptr());
    }
    call.p.guidance_scale = 1.0f;
    call.p.fresh = true;
    if (!call.run(row, seed, sample_ids, noise_step, streams, threads)) return py::none();
    return outs;
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

}  // namespace fastgen
