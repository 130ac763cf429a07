// How the module sees a torch tensor: through DLPack's C exchange table where torch has one (2.10
// and later; tens of nanoseconds), through the tensor's own Python attributes where it has not.
#pragma once

#include <pybind11/pybind11.h>

#include "layout.h"

namespace fastgen {

namespace py = pybind11;

struct View {
    void* data;
    int dtype;  // a DType, or -1
    bool on_cpu;
    int gpu;  // the CUDA device it is on, or -1
    int ndim;
    const int64_t* size;
    const int64_t* stride;
    int64_t storage[2 * kMaxRank];  // size and stride, where torch lends no arrays of its own

    View() = default;
    View(const View&) = delete;  // size and stride may point into storage
    View& operator=(const View&) = delete;

    bool has_size_of(const View& other) const {
        if (ndim != other.ndim) return false;
        for (int dim = 0; dim < ndim; ++dim)
            if (size[dim] != other.size[dim]) return false;
        return true;
    }

    bool is_contiguous() const {
        int64_t expected = 1;
        for (int dim = ndim - 1; dim >= 0; --dim) {
            if (size[dim] != 1 && stride[dim] != expected) return false;
            expected *= size[dim];
        }
        return true;
    }

    int64_t elements() const {
        int64_t count = 1;
        for (int dim = 0; dim < ndim; ++dim) count *= size[dim];
        return count;
    }
};

// What the module needs of torch, handed over once. modes: (function, what it returns where nothing
// stands between a call and its kernel), ...; threads: torch.get_num_threads; gpu_stream: from a
// CUDA device to the address of its current stream, or None.
void set_torch(py::tuple dtypes, py::tuple types, py::object empty_like, py::object exchange,
               py::tuple modes, py::object threads, py::object gpu_stream);

// Whether all modes are off.
bool is_eager();

int torch_threads();

void* torch_stream(int gpu);

// Fills `view`; throws the Python error of a tensor that has no memory to show.
void look_at(PyObject* tensor, View& view);

// The same, but false for such a tensor.
bool try_look_at(PyObject* tensor, View& view);

// An integer of a tensor of one element on the CPU; false where it cannot be read. whole: whether
// the dtype may be one of integers.
bool try_read_index(PyObject* tensor, int64_t& value, bool& whole);

// Which element of a tensor of one dim on a GPU another is, by its place in memory, which needs no
// look at the device; or -1.
int64_t element_of(PyObject* tensor, PyObject* element);

// Whether a tensor is all that its memory shows: exactly torch.Tensor or Parameter, no negative or
// zero flag, and no gradient wanted while gradients are being recorded.
bool is_ordinary(PyObject* tensor, bool grad);

// Asks for large pages in the memory of a tensor just allocated, where it is of several megabytes
// (as NumPy does): the page faults of its first touch cost more than a kernel's arithmetic.
void use_huge_pages(PyObject* tensor);

py::object new_like(PyObject* tensor);
py::object new_like(PyObject* tensor, int dtype);  // a DType

// tensor.normal_(generator=generator); false, with nothing drawn, where torch does not.
bool try_fill_normal(PyObject* tensor, PyObject* generator);

}  // namespace fastgen
