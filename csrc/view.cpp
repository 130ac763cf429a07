#include "view.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastgen {
namespace {

// The part of DLPack 1.x's exchange table that is used here, as its specification lays it out.
struct DlDevice {
    int32_t type;
    int32_t id;
};
struct DlDataType {
    uint8_t code, bits;
    uint16_t lanes;
};
struct DlTensor {
    void* data;
    DlDevice device;
    int32_t ndim;
    DlDataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};
struct DlExchange {
    uint32_t major, minor;
    DlExchange* previous;
    void* allocate;
    void* export_managed;
    void* import_managed;
    int (*tensor_from_object)(void* object, DlTensor* out);
    void* current_stream;
};
#if defined(FASTGEN_EMULATED)
constexpr int kDlCpu = -1, kDlCuda = 1;  // the memory of the CPU stands for a GPU's
#else
constexpr int kDlCpu = 1, kDlCuda = 2;
#endif
constexpr int kDlInt = 0, kDlFloat = 2, kDlBfloat = 4;

DlExchange* exchange_table = nullptr;
PyObject* torch_dtypes[3];
PyObject* tensor_types[2];
PyObject *empty_like, *dtype_keyword, *generator_keyword, *mode_functions, *get_threads,
    *get_stream;
PyObject *name_normal, *name_data_ptr, *name_dtype, *name_stride, *name_shape, *name_is_cpu,
    *name_is_neg, *name_is_zero, *name_requires_grad;

py::object checked(PyObject* object) {
    if (!object) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
}

py::object attribute(PyObject* object, PyObject* name) {
    return checked(PyObject_GetAttr(object, name));
}

py::object call_method(PyObject* object, PyObject* name) {
    return checked(PyObject_CallMethodNoArgs(object, name));
}

int read_dims(const py::object& dims, int64_t* out) {
    const int count = int(PyTuple_GET_SIZE(dims.ptr()));
    if (count > kMaxRank) throw py::value_error("more dimensions than torch allows");
    for (int i = 0; i < count; ++i) {
        out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(dims.ptr(), i));
        if (out[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
    }
    return count;
}

void look_by_attributes(PyObject* tensor, View& view) {
    const py::object pointer = call_method(tensor, name_data_ptr);
    view.data = PyLong_AsVoidPtr(pointer.ptr());
    if (!view.data && PyErr_Occurred()) throw py::error_already_set();
    view.on_cpu = attribute(tensor, name_is_cpu).ptr() == Py_True;
    view.gpu = -1;
    view.ndim = read_dims(attribute(tensor, name_shape), view.storage);
    read_dims(call_method(tensor, name_stride), view.storage + kMaxRank);
    view.size = view.storage;
    view.stride = view.storage + kMaxRank;
    const py::object dtype = attribute(tensor, name_dtype);
    view.dtype = -1;
    for (int code = 0; code < 3; ++code)
        if (torch_dtypes[code] == dtype.ptr()) view.dtype = code;
}

}  // namespace

void set_torch(py::tuple dtypes, py::tuple types, py::object allocate, py::object exchange,
               py::tuple modes, py::object threads, py::object gpu_stream) {
    for (int i = 0; i < 3; ++i) torch_dtypes[i] = py::object(dtypes[i]).release().ptr();
    for (int i = 0; i < 2; ++i) tensor_types[i] = py::object(types[i]).release().ptr();
    empty_like = allocate.release().ptr();
    mode_functions = modes.release().ptr();
    get_threads = threads.release().ptr();
    get_stream = gpu_stream.release().ptr();
    dtype_keyword = py::make_tuple("dtype").release().ptr();
    generator_keyword = py::make_tuple("generator").release().ptr();
    name_normal = PyUnicode_InternFromString("normal_");
    name_data_ptr = PyUnicode_InternFromString("data_ptr");
    name_dtype = PyUnicode_InternFromString("dtype");
    name_stride = PyUnicode_InternFromString("stride");
    name_shape = PyUnicode_InternFromString("shape");
    name_is_cpu = PyUnicode_InternFromString("is_cpu");
    name_is_neg = PyUnicode_InternFromString("is_neg");
    name_is_zero = PyUnicode_InternFromString("_is_zerotensor");
    name_requires_grad = PyUnicode_InternFromString("requires_grad");
    exchange_table = nullptr;
    if (exchange.is_none()) return;
    auto* table = static_cast<DlExchange*>(
        PyCapsule_GetPointer(exchange.release().ptr(), "dlpack_exchange_api"));
    while (table && table->major != 1) table = table->previous;
    PyErr_Clear();
    exchange_table = table;
}

bool is_eager() {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(mode_functions); ++i) {
        PyObject* mode = PyTuple_GET_ITEM(mode_functions, i);
        const py::object state = checked(PyObject_CallNoArgs(PyTuple_GET_ITEM(mode, 0)));
        const int off = PyObject_RichCompareBool(state.ptr(), PyTuple_GET_ITEM(mode, 1), Py_EQ);
        if (off < 0) throw py::error_already_set();
        if (!off) return false;
    }
    return true;
}

int torch_threads() {
    const long threads = PyLong_AsLong(checked(PyObject_CallNoArgs(get_threads)).ptr());
    if (threads == -1 && PyErr_Occurred()) throw py::error_already_set();
    return int(threads);
}

void* torch_stream(int gpu) {
    if (get_stream == Py_None) throw std::runtime_error("this torch has no CUDA");
    const py::int_ device(gpu);
    const py::object stream = checked(PyObject_CallOneArg(get_stream, device.ptr()));
    void* address = PyLong_AsVoidPtr(stream.ptr());
    if (!address && PyErr_Occurred()) throw py::error_already_set();
    return address;
}

void look_at(PyObject* tensor, View& view) {
    if (!exchange_table) return look_by_attributes(tensor, view);
    DlTensor seen;
    if (exchange_table->tensor_from_object(tensor, &seen) != 0) throw py::error_already_set();
    view.data = static_cast<char*>(seen.data) + seen.byte_offset;
    view.on_cpu = seen.device.type == kDlCpu;
    view.gpu = seen.device.type == kDlCuda ? seen.device.id : -1;
    view.ndim = seen.ndim;
    view.size = seen.shape;
    view.stride = seen.strides;
    view.dtype = -1;
    if (seen.dtype.lanes != 1) return;
    if (seen.dtype.code == kDlFloat && seen.dtype.bits == 32) view.dtype = kFloat32;
    if (seen.dtype.code == kDlFloat && seen.dtype.bits == 16) view.dtype = kFloat16;
    if (seen.dtype.code == kDlBfloat && seen.dtype.bits == 16) view.dtype = kBFloat16;
}

bool try_look_at(PyObject* tensor, View& view) {
    try {
        look_at(tensor, view);
        return true;
    } catch (const std::exception&) {
        return false;
    }
}

bool try_read_index(PyObject* tensor, int64_t& value, bool& whole) {
    whole = true;
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    if (!exchange_table || type != tensor_types[0]) return false;
    DlTensor seen;
    if (exchange_table->tensor_from_object(tensor, &seen) != 0) {
        PyErr_Clear();
        return false;
    }
    whole = seen.dtype.code != kDlFloat && seen.dtype.code != kDlBfloat;
    if (seen.dtype.code != kDlInt || seen.device.type != kDlCpu) return false;
    for (int dim = 0; dim < seen.ndim; ++dim)
        if (seen.shape[dim] != 1) return false;
    const char* data = static_cast<const char*>(seen.data) + seen.byte_offset;
    if (seen.dtype.bits == 64)
        value = *reinterpret_cast<const int64_t*>(data);
    else if (seen.dtype.bits == 32)
        value = *reinterpret_cast<const int32_t*>(data);
    else
        return false;
    return true;
}

int64_t element_of(PyObject* tensor, PyObject* element) {
    if (!exchange_table || reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != tensor_types[0] ||
        reinterpret_cast<PyObject*>(Py_TYPE(element)) != tensor_types[0])
        return -1;
    DlTensor whole, part;
    if (exchange_table->tensor_from_object(tensor, &whole) != 0 ||
        exchange_table->tensor_from_object(element, &part) != 0) {
        PyErr_Clear();
        return -1;
    }
    if (part.device.type != kDlCuda || whole.device.type != kDlCuda ||
        part.device.id != whole.device.id || part.dtype.code != whole.dtype.code ||
        part.dtype.bits != whole.dtype.bits || whole.ndim != 1)
        return -1;
    for (int dim = 0; dim < part.ndim; ++dim)
        if (part.shape[dim] != 1) return -1;
    const int64_t step = whole.strides[0] * (whole.dtype.bits / 8);
    const int64_t offset = (static_cast<char*>(part.data) + part.byte_offset) -
                           (static_cast<char*>(whole.data) + whole.byte_offset);
    const bool there =
        step > 0 && offset >= 0 && offset % step == 0 && offset / step < whole.shape[0];
    return there ? offset / step : -1;
}

bool is_ordinary(PyObject* tensor, bool grad) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    if (type != tensor_types[0] && type != tensor_types[1]) return false;
    if (grad && attribute(tensor, name_requires_grad).ptr() == Py_True) return false;
    return call_method(tensor, name_is_neg).ptr() == Py_False &&
           call_method(tensor, name_is_zero).ptr() == Py_False;
}

void use_huge_pages(PyObject* tensor) {
#if defined(MADV_HUGEPAGE)
    constexpr int64_t kLeastBytes = int64_t{4} << 20;
    constexpr uintptr_t kPage = 4096;
    View view;
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != tensor_types[0]) return;
    if (!try_look_at(tensor, view) || !view.on_cpu || view.dtype < 0) return;
    const int64_t bytes = view.elements() * (view.dtype == kFloat32 ? 4 : 2);
    if (bytes < kLeastBytes) return;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(view.data) + kPage - 1) & ~(kPage - 1);
    const uintptr_t end =
        (reinterpret_cast<uintptr_t>(view.data) + uintptr_t(bytes)) & ~(kPage - 1);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)tensor;
#endif
}

py::object new_like(PyObject* tensor) {
    py::object made = checked(PyObject_CallOneArg(empty_like, tensor));
    use_huge_pages(made.ptr());
    return made;
}

py::object new_like(PyObject* tensor, int dtype) {
    PyObject* arguments[] = {tensor, torch_dtypes[dtype]};
    py::object made = checked(PyObject_Vectorcall(empty_like, arguments, 1, dtype_keyword));
    use_huge_pages(made.ptr());
    return made;
}

bool try_fill_normal(PyObject* tensor, PyObject* generator) {
    PyObject* arguments[] = {tensor, generator};
    PyObject* made = PyObject_VectorcallMethod(name_normal, arguments, 1, generator_keyword);
    if (made) {
        Py_DECREF(made);
        return true;
    }
    if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
    PyErr_Clear();
    return false;
}

}  // namespace fastgen
