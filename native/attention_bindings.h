// What bindings.cpp calls to expose the attention kernels to tests.
#pragma once

#include <nanobind/nanobind.h>

namespace miaotui {

void bind_attention(nanobind::module_& m);

}  // namespace miaotui
