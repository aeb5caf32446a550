// Whether objects of Python are what they were, looked up without a step of the interpreter: its own look at each of some hundred
// takes longer than a small tensor, most of all where nothing of it is in a cache.

#pragma once

#include <cstdint>

extern "C" {

// Of Python's stable interface, by hand, since its headers may be absent; null outside of a process of Python.
struct PyObject;
__attribute__((weak)) PyObject* PyDict_GetItemWithError(PyObject*, PyObject*);
__attribute__((weak)) PyObject* PyObject_Type(PyObject*);
__attribute__((weak)) PyObject* PyObject_GenericGetDict(PyObject*, void*);
__attribute__((weak)) intptr_t PyObject_Size(PyObject*);
__attribute__((weak)) void PyErr_Clear();
__attribute__((weak)) void Py_DecRef(PyObject*);

// As watched.py lays it out: dictionaries with the keys and values of entries; containers with their lengths; objects with their types
// and dictionaries.
struct Watched {
  int64_t entries, containers, objects;
  PyObject **dictionaries, **keys, **values, **held;
  const int64_t* lengths;
  PyObject **parts, **types, **own;
};
}

namespace {

inline bool can_watch() {
  return PyDict_GetItemWithError && PyObject_Type && PyObject_GenericGetDict && PyObject_Size && PyErr_Clear && Py_DecRef;
}

inline void fetch(PyObject* const* objects, int64_t n) {
  for (int64_t i = 0; i < n; i++) __builtin_prefetch(objects[i]);
}

// Whether a reference that was handed over is one to an object.
inline bool is(PyObject* found, const PyObject* expected) {
  if (found) Py_DecRef(found);
  return found == expected;
}

// Called by a thread that holds the interpreter's lock. What differs may still be equal: Python decides then.
inline bool is_same(const Watched& watched) {
  fetch(watched.held, watched.containers);
  fetch(watched.keys, watched.entries);
  fetch(watched.parts, watched.objects);
  bool same = true;
  for (int64_t i = 0; same && i < watched.containers; i++) same = PyObject_Size(watched.held[i]) == watched.lengths[i];
  for (int64_t i = 0; same && i < watched.entries; i++)
    same = PyDict_GetItemWithError(watched.dictionaries[i], watched.keys[i]) == watched.values[i];
  for (int64_t i = 0; same && i < watched.objects; i++)
    same = is(PyObject_Type(watched.parts[i]), watched.types[i]) &&
           is(PyObject_GenericGetDict(watched.parts[i], nullptr), watched.own[i]);
  if (!same) PyErr_Clear();
  return same;
}

}  // namespace
