/* A launch of a kernel whose arguments are known but for the addresses of its tensors: see driver.py.

   launcher(...) returns a function of a list of tensors. It makes the tensors that are the launch's
   own, writes all addresses into a copy of the arguments, and has CUDA's driver launch the kernel.
   In Python each of these steps takes a busy host microseconds; what is called here is what Python
   would call. Built by Triton, with the compiler that it needs for itself. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define INVALID_CONTEXT 201 /* of CUDA's driver: this thread has not used the GPU yet */

/* CUDA's CUlaunchConfig. */
typedef struct {
    unsigned int grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned int attribute_count;
} Config;

typedef int (*LaunchKernel)(const Config *, void *function, void **parameters, void **extra);

typedef struct {
    LaunchKernel launch;
    void *function;
    Config config;
    Py_ssize_t given, made, cells, parameters;
    uint64_t *values;   /* by cell; those of tensors, given ones first, are written in each call */
    Py_ssize_t *places; /* by parameter: its cell */
    PyObject *name, *device;
    PyObject *forms;    /* shape, strides and dtype of each tensor to make */
    PyObject *returned; /* which of these are results */
    PyObject *empty;    /* (shape, strides, dtype) -> tensor */
    PyObject *stream;   /* (device) -> current stream's address */
    PyObject *enter;    /* (device): makes it this thread's */
} Launch;

static PyObject *data_ptr;

static void release(PyObject *capsule) {
    Launch *l = PyCapsule_GetPointer(capsule, NULL);
    PyObject *held[] = {l->name, l->device, l->forms, l->returned, l->empty, l->stream, l->enter};
    for (size_t i = 0; i < sizeof(held) / sizeof(*held); i++) Py_XDECREF(held[i]);
    PyMem_Free(l->values);
    PyMem_Free(l->places);
    PyMem_Free(l);
}

/* A number that a call has returned; the reference to it is taken. -1 and an exception on failure. */
static int number(PyObject *made, uint64_t *found) {
    if (made == NULL) return -1;
    *found = PyLong_AsUnsignedLongLong(made);
    Py_DECREF(made);
    return PyErr_Occurred() ? -1 : 0;
}

static int launch(const Launch *l, uint64_t *values) {
    void *parameters[l->parameters + 1]; /* none is no array */
    Config config = l->config;
    uint64_t stream;
    int status = 0;
    for (Py_ssize_t i = 0; i < l->parameters; i++) parameters[i] = values + l->places[i];
    for (int attempt = 0; attempt < 2; attempt++) {
        if (number(PyObject_CallOneArg(l->stream, l->device), &stream)) return -1;
        config.stream = (void *)(uintptr_t)stream;
        Py_BEGIN_ALLOW_THREADS
        status = l->launch(&config, l->function, parameters, NULL);
        Py_END_ALLOW_THREADS
        if (status != INVALID_CONTEXT || attempt) break;
        PyObject *entered = PyObject_CallOneArg(l->enter, l->device);
        if (entered == NULL) return -1;
        Py_DECREF(entered);
    }
    if (status == 0) return 0;
    PyErr_Format(PyExc_RuntimeError, "%U: CUDA's driver refused the launch, error %d.", l->name, status);
    return -1;
}

/* The results among what was made. */
static PyObject *results(const Launch *l, PyObject *made) {
    PyObject *kept = PyList_New(0);
    for (Py_ssize_t i = 0; kept != NULL && i < l->made; i++) {
        if (PyTuple_GET_ITEM(l->returned, i) != Py_True) continue;
        if (PyList_Append(kept, PyList_GET_ITEM(made, i))) Py_CLEAR(kept);
    }
    return kept;
}

static PyObject *call(PyObject *self, PyObject *tensors) {
    const Launch *l = PyCapsule_GetPointer(self, NULL);
    uint64_t values[l->cells];
    PyObject *made = NULL, *kept = NULL;
    PyObject *given = PySequence_Fast(tensors, "a launch is given a list of tensors.");
    if (given == NULL) return NULL;
    if (PySequence_Fast_GET_SIZE(given) != l->given) {
        PyErr_Format(PyExc_ValueError, "%U: %zd tensors are given, %zd were recorded.", l->name,
                     PySequence_Fast_GET_SIZE(given), l->given);
        goto end;
    }
    memcpy(values, l->values, sizeof(*values) * l->cells);
    for (Py_ssize_t i = 0; i < l->given; i++) {
        PyObject *tensor = PySequence_Fast_GET_ITEM(given, i);
        if (number(PyObject_CallMethodNoArgs(tensor, data_ptr), values + i)) goto end;
    }
    made = PyList_New(l->made);
    if (made == NULL) goto end;
    for (Py_ssize_t i = 0; i < l->made; i++) {
        PyObject *tensor = PyObject_CallObject(l->empty, PyTuple_GET_ITEM(l->forms, i));
        if (tensor == NULL) goto end;
        PyList_SET_ITEM(made, i, tensor);
        if (number(PyObject_CallMethodNoArgs(tensor, data_ptr), values + l->given + i)) goto end;
    }
    if (l->config.grid[0] && launch(l, values)) goto end; /* CUDA refuses no programs */
    kept = results(l, made);
end:
    Py_XDECREF(made);
    Py_DECREF(given);
    return kept;
}

static PyMethodDef call_method = {"launch", call, METH_O, "Launch the kernel; list of its results."};

static PyObject *launcher(PyObject *module, PyObject *args) {
    unsigned long long driver, function;
    unsigned int grid, threads, shared;
    Py_buffer values;
    PyObject *places, *made = NULL;
    Launch *l = PyMem_Calloc(1, sizeof(Launch));
    if (l == NULL) return PyErr_NoMemory();
    PyObject *capsule = PyCapsule_New(l, NULL, release);
    if (capsule == NULL) return PyMem_Free(l), NULL;
    if (!PyArg_ParseTuple(args, "KKIIIy*O!nUOO!O!OOO", &driver, &function, &grid, &threads, &shared,
                          &values, &PyTuple_Type, &places, &l->given, &l->name, &l->device,
                          &PyTuple_Type, &l->forms, &PyTuple_Type, &l->returned, &l->empty,
                          &l->stream, &l->enter)) {
        l->name = l->device = l->forms = l->returned = l->empty = l->stream = l->enter = NULL;
        Py_DECREF(capsule);
        return NULL;
    }
    PyObject *held[] = {l->name, l->device, l->forms, l->returned, l->empty, l->stream, l->enter};
    for (size_t i = 0; i < sizeof(held) / sizeof(*held); i++) Py_INCREF(held[i]);
    l->launch = (LaunchKernel)(uintptr_t)driver;
    l->function = (void *)(uintptr_t)function;
    l->config = (Config){{grid, 1, 1}, {threads, 1, 1}, shared, NULL, NULL, 0};
    l->made = PyTuple_GET_SIZE(l->forms);
    l->cells = values.len / (Py_ssize_t)sizeof(*l->values);
    l->parameters = PyTuple_GET_SIZE(places);
    l->values = PyMem_Malloc(values.len ? values.len : 1);
    l->places = PyMem_Calloc(l->parameters + 1, sizeof(*l->places));
    if (l->values == NULL || l->places == NULL) {
        PyErr_NoMemory();
        goto end;
    }
    memcpy(l->values, values.buf, values.len);
    for (Py_ssize_t i = 0; i < l->parameters; i++) {
        l->places[i] = PyLong_AsSsize_t(PyTuple_GET_ITEM(places, i));
        if (PyErr_Occurred()) goto end;
        if (l->places[i] < 0 || l->places[i] >= l->cells) {
            PyErr_SetString(PyExc_ValueError, "an argument's place is none of the cells.");
            goto end;
        }
    }
    if (l->given < 0 || l->given + l->made > l->cells || PyTuple_GET_SIZE(l->returned) != l->made) {
        PyErr_SetString(PyExc_ValueError, "tensors and cells do not fit together.");
        goto end;
    }
    made = PyCFunction_New(&call_method, capsule);
end:
    PyBuffer_Release(&values);
    Py_DECREF(capsule); /* the function, if there is one, holds it */
    return made;
}

static PyMethodDef methods[] = {{"launcher", launcher, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "moda_compile_launcher", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_moda_compile_launcher(void) {
    data_ptr = PyUnicode_InternFromString("data_ptr");
    return data_ptr == NULL ? NULL : PyModule_Create(&definition);
}
