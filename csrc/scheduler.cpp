// The straight path of runs: a step of a Loop or of a scheduler, looked at, laid out and run at
// once.
#include <algorithm>

#include "straight.h"

namespace fastgen {
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
        if (!try_look_at(tensor, view) || view.dtype < 0 || view.ndim > kMaxRank) return false;
        if (count_++ == 0) return is_in_reach(view);
        return is_beside(view, views_[0]) && view.has_size_of(views_[0]);
    }

    // [uncond, cond] in one tensor of twice the batch.
    bool add_both(PyObject* output) {
        const int64_t batch = views_[0].ndim ? views_[0].size[0] : 0;
        View& both = views_[count_];
        slots_[count_++] = &p.uncond;
        if (batch == 0 || !is_ordinary(output, grad_) || !try_look_at(output, both) ||
            !is_beside(both, views_[0]) || both.dtype < 0 || both.ndim != views_[0].ndim)
            return false;
        int64_t doubled[kMaxRank];
        std::copy(views_[0].size, views_[0].size + both.ndim, doubled);
        doubled[0] *= 2;
        if (!std::equal(doubled, doubled + both.ndim, both.size)) return false;
        both.size = views_[0].size;
        View& half = views_[count_];
        slots_[count_++] = &p.cond;
        half.dtype = both.dtype;
        half.on_cpu = both.on_cpu;
        half.gpu = both.gpu;
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

    // What a row reads of a list.
    bool add_history_read(PyObject* history, const StepRow& row) {
        for (int k = 0; k < kHistory && k < int(PyList_GET_SIZE(history)); ++k) {
            bool read = false;
            for (const auto& weights : row.weights) read |= weights[kFirstHistory + k] != 0.0f;
            PyObject* slot = PyList_GET_ITEM(history, k);
            if (!read || slot == Py_None) continue;
            held_[k] = py::reinterpret_borrow<py::object>(slot);  // others may change the list
            if (!add(p.history[k], slot)) return false;
        }
        return true;
    }

    // Whether a second thread is of no use, whatever is drawn.
    bool is_small() const { return views_[0].elements() < std::min(kPlainGrain, kNoiseGrain); }

    // Tensors to write, which must share no memory with what the network or the caller gave.
    bool add_outs(py::handle outs) {
        for (int j = 0; j < kOutputs && j < int(PyTuple_GET_SIZE(outs.ptr())); ++j) {
            if (!add(p.out[j], PyTuple_GET_ITEM(outs.ptr(), j))) return false;
            for (int i = 1; i < given_; ++i)
                if (may_spoil(views_[count_ - 1], views_[i])) return false;
        }
        return true;
    }

    // False where the tensors have more separate dims than a kernel walks, or the seeds are
    // elsewhere.
    bool lay_out(py::handle row, py::handle seed, py::handle sample_ids, py::handle noise_step,
                 py::handle streams) {
        memcpy(&p.row, PyBytes_AS_STRING(row.ptr()), sizeof(StepRow));
        p.draws = !seed.is_none();
        if (p.draws) {
            if (PyTuple_Check(seed.ptr()) && !has_beside(PyTuple_GET_ITEM(seed.ptr(), 0)))
                return false;
            if (!PyLong_Check(sample_ids.ptr()) && !has_beside(sample_ids.ptr())) return false;
            read_key(p.key, seed, sample_ids, noise_step, py::none());
            for (int m = 0; m < kNoises; ++m)
                p.stream[m] = int32_t(as_int(PyTuple_GET_ITEM(streams.ptr(), m)));
        }
        Call call(views_[0]);
        for (int i = 0; i < count_; ++i) call.add(*slots_[i], views_[i]);
        return call.try_lay_out(p.shape, p.draws, p.draws || p.guidance);
    }

    void run(int threads) {
        FASTGEN_RUN_AT(views_[0], step, p, p.draws ? kNoiseGrain : kPlainGrain, threads);
    }

    const View& view(int index) const { return views_[index]; }

   private:
    bool has_beside(PyObject* tensor) const {
        View view;
        return try_look_at(tensor, view) && is_beside(view, views_[0]);
    }

    static constexpr int kRoom = 3 + kNoises + kHistory + kOutputs;
    bool grad_;
    int count_ = 0, given_ = 0;
    py::object held_[kHistory];
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
    if (!call.lay_out(row, seed, sample_ids, noise_step, streams)) return false;
    call.run(threads);
    return true;
}

namespace {

// What a class of schedulers asks of a step, as fastgen/integrations/diffusers/base.py adds it up.
enum Rule {
    kOfSample = 3,
    kOfOutput = 4,
    kOfBoth = 5,
    kWhose = 7,         // whose dtype the result has
    kShownWide = 8,     // float32 for what is shown beside it
    kKeeps = 16,        // rows read former results
    kWantsFloat = 32,   // an index is no timestep
    kWantsScaled = 64,  // the sample was scaled before the network saw it
    kByTimestep = 128,  // no count of steps is kept
    kDrawsWide = 256    // torch draws normals of float32, whatever the output is
};

// Where the normals of a step come from: tensors given, a seed, or torch, which then draws as many
// as the network's output has.
struct Noise {
    PyObject* given = nullptr;  // a tuple
    PyObject *seed = Py_None, *ids = Py_None;
    PyObject* generator = nullptr;  // torch's own, or None for its global one
};

// A row, as (bytes, targets of its outputs, how many normals it takes).
struct Step {
    PyObject *packed, *targets;
    StepRow row;

    Step(PyObject* bytes, PyObject* outputs) : packed(bytes), targets(outputs) {
        memcpy(&row, PyBytes_AS_STRING(packed), sizeof row);
    }
};

// (the next sample, what is shown beside it where the last target is kShown), or None where a
// tensor or the call is out of the ordinary. What else the row makes goes into `kept`.
py::object take(const Step& step, int rule, PyObject* kept, PyObject* sample, PyObject* output,
                const Noise& noise, PyObject* place, PyObject* streams) {
    constexpr int64_t kShown = 6;
    if (!is_eager()) return py::none();
    StepCall call(true);
    if (!call.add(call.p.x, sample) || !call.add(call.p.cond, output) ||
        (noise.given && !call.add_noise(noise.given)) ||
        (kept && !call.add_history_read(kept, step.row)))
        return py::none();
    const int of_sample = call.view(0).dtype, of_output = call.view(1).dtype;
    py::object drawn;
    if (noise.generator) {
        // the draws are in order, and of the dtype that both have
        if (!call.view(1).is_contiguous() || of_sample != of_output) return py::none();
        const bool wide = (rule & kDrawsWide) && of_output != kFloat32;
        drawn = wide ? new_like(output, kFloat32) : new_like(output);
        if (!call.add_own(call.p.given_noise[0], drawn.ptr())) return py::none();
    }
    const int of_both = of_sample == of_output ? of_sample : int(kFloat32);
    const int outputs = int(PyTuple_GET_SIZE(step.targets));
    const auto target = [&](int j) { return as_int(PyTuple_GET_ITEM(step.targets, j)); };
    const bool shows = outputs > 1 && target(outputs - 1) == kShown;
    const int last = outputs - shows;
    if (last > 1 && !kept) return py::none();
    py::object outs[kOutputs];
    for (int j = 0; j < outputs; ++j) {
        int dtype = kFloat32;
        if (j == 0)
            dtype = (rule & kWhose) == kOfSample   ? of_sample
                    : (rule & kWhose) == kOfOutput ? of_output
                                                   : of_both;
        else if (j == last && !(rule & kShownWide))
            dtype = of_both;
        outs[j] = dtype == of_sample ? new_like(sample) : new_like(sample, dtype);
        if (!call.add_own(call.p.out[j], outs[j].ptr())) return py::none();
    }
    call.p.guidance_scale = 1.0f;
    call.p.fresh = true;
    if (!call.lay_out(step.packed, noise.seed, noise.ids, place, streams)) return py::none();
    if (noise.generator && !try_fill_normal(drawn.ptr(), noise.generator)) return py::none();
    call.run(call.is_small() || !call.view(0).on_cpu ? 1 : torch_threads());
    for (int j = 1; j < last; ++j)
        if (PyList_SetItem(kept, target(j), outs[j].release().ptr()) != 0)
            throw py::error_already_set();
    py::tuple results(1 + shows);
    PyTuple_SET_ITEM(results.ptr(), 0, outs[0].release().ptr());
    if (shows) PyTuple_SET_ITEM(results.ptr(), 1, outs[last].release().ptr());
    return results;
}

py::object item_of(PyObject* dict, PyObject* key) {
    PyObject* item = PyDict_GetItemWithError(dict, key);
    if (!item && PyErr_Occurred()) throw py::error_already_set();
    return py::reinterpret_borrow<py::object>(item);
}

// A timestep on the host as a number, or null; whole: whether it is one of integers.
py::object number_of(PyObject* timestep, bool& whole) {
    whole = PyLong_Check(timestep);
    if (whole) return py::reinterpret_borrow<py::object>(timestep);
    if (PyFloat_Check(timestep)) return {};
    int64_t value;
    if (!try_read_index(timestep, value, whole)) return {};
    return whole ? py::int_(value) : py::object();
}

// The number of one of a scheduler's own timesteps on a GPU, or null.
py::object number_on_gpu(PyObject* own, PyObject* timestep) {
    static PyObject* const timesteps_name = PyUnicode_InternFromString("timesteps");
    static PyObject* const times_name = PyUnicode_InternFromString("_times");
    const py::object timesteps = item_of(own, timesteps_name), times = item_of(own, times_name);
    if (!timesteps || !times || !PyList_Check(times.ptr())) return {};
    const int64_t index = element_of(timesteps.ptr(), timestep);
    if (index < 0 || index >= PyList_GET_SIZE(times.ptr())) return {};
    return py::reinterpret_borrow<py::object>(PyList_GET_ITEM(times.ptr(), index));
}

}  // namespace

// A step of a scheduler whose row, noise and history the caller has found: as `take` gives it.
py::object scheduler_step(PyObject* const* args) {
    const Step step(args[0], args[1]);
    Noise noise;
    noise.given = PyTuple_GET_ITEM(args[6], 0);
    noise.seed = PyTuple_GET_ITEM(args[6], 1);
    noise.ids = PyTuple_GET_ITEM(args[6], 2);
    return take(step, int(as_int(args[2])), args[3] == Py_None ? nullptr : args[3], args[4],
                args[5], noise, args[7], args[8]);
}

// A step of a scheduler that is under way, found and counted here: own is its dict, which has
//     _steps: from options to a list of (bytes, targets, normals) or None, a row each; normals is
//         how many it takes, -1 where it takes none but torch draws them
//     _step_index and _start, counted in steps; or _places, from timestep to row
//     _kept: the history;  _seeds: (seed, sample ids) or None
// generator: False where the seeds give the normals, or nothing does; else torch's, which draws.
// None, with nothing changed, where anything is out of the ordinary.
py::object scheduler_step_under_way(PyObject* const* args) {
    static PyObject* const steps_name = PyUnicode_InternFromString("_steps");
    static PyObject* const index_name = PyUnicode_InternFromString("_step_index");
    static PyObject* const start_name = PyUnicode_InternFromString("_start");
    static PyObject* const places_name = PyUnicode_InternFromString("_places");
    static PyObject* const kept_name = PyUnicode_InternFromString("_kept");
    static PyObject* const seeds_name = PyUnicode_InternFromString("_seeds");
    static PyObject* const scaled_name = PyUnicode_InternFromString("is_scale_input_called");
    PyObject *own = args[0], *options = args[2], *timestep = args[3], *generator = args[7];
    const int rule = int(as_int(args[1]));
    const py::object variants = item_of(own, steps_name);
    if (!variants) return py::none();
    const py::object steps = item_of(variants.ptr(), options);
    if (!steps) return py::none();
    if ((rule & kWantsScaled) && item_of(own, scaled_name).ptr() != Py_True) return py::none();
    py::object place;
    int64_t index;
    if (rule & kByTimestep) {
        bool whole;
        const py::object places = item_of(own, places_name);
        py::object number = number_of(timestep, whole);
        if (!number) number = number_on_gpu(own, timestep);
        if (number && places) place = item_of(places.ptr(), number.ptr());
        if (!place) return py::none();
        index = as_int(place.ptr());
        if (index == 0) return py::none();  // another run
    } else {
        bool whole = false;
        if (rule & kWantsFloat) number_of(timestep, whole);
        place = item_of(own, index_name);
        const py::object start = item_of(own, start_name);
        if (whole || !place || !start || !PyLong_Check(place.ptr())) return py::none();
        index = as_int(place.ptr()) - as_int(start.ptr());
    }
    if (index < 0 || index >= PyList_GET_SIZE(steps.ptr())) return py::none();
    const auto found = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(steps.ptr(), index));
    if (found.is_none()) return py::none();
    const py::object kept = rule & kKeeps ? item_of(own, kept_name) : py::object();
    const int64_t normals = as_int(PyTuple_GET_ITEM(found.ptr(), 2));
    Noise noise;
    py::object seeds;
    if (generator != Py_False && normals != 0) {
        if (normals != 1) return py::none();
        noise.generator = generator;
    } else if (normals > 0) {
        seeds = item_of(own, seeds_name);
        if (!seeds || seeds.is_none()) return py::none();
        noise.seed = PyTuple_GET_ITEM(seeds.ptr(), 0);
        noise.ids = PyTuple_GET_ITEM(seeds.ptr(), 1);
    }
    const Step step(PyTuple_GET_ITEM(found.ptr(), 0), PyTuple_GET_ITEM(found.ptr(), 1));
    py::object results =
        take(step, rule, kept.ptr(), args[4], args[5], noise, place.ptr(), args[6]);
    if (!results.is_none() && !(rule & kByTimestep)) {
        const py::int_ next(as_int(place.ptr()) + 1);
        if (PyDict_SetItem(own, index_name, next.ptr()) != 0) throw py::error_already_set();
    }
    return results;
}

}  // namespace fastgen
