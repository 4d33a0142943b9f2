// What bindings.cpp calls to expose sampling.
#pragma once

#include <nanobind/nanobind.h>

namespace miaotui {

void bind_sampling(nanobind::module_& m);

}  // namespace miaotui
