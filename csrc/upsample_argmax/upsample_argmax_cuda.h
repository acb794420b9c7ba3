// upsample_argmax on CUDA: entry point. No torch and no device code here.
#pragma once
#include "upsample_argmax.h"

namespace ovseg {

template <typename A>
const char* upsample_argmax_on_device(const UpsampleParams<A>& p, void* stream);  // null, or the text of an error

}  // namespace ovseg
