// The launches of center_assignment, one translation unit per kind of arithmetic: OVSEG_KIND at the end.
#pragma once
#include "center_assignment_few.cuh"
#include "center_assignment_many.cuh"

#define OVSEG_KIND(kind)                                                              \
  namespace ovseg {                                                                   \
  const char* center_forward_##kind(const CenterCuda<kind::A>& x) {                   \
    return few_plan(x.p, false).fits ? few_forward<kind>(x) : many_forward<kind>(x);  \
  }                                                                                   \
  const char* center_backward_##kind(const CenterCuda<kind::A>& x) {                  \
    return few_plan(x.p, true).fits ? few_backward<kind>(x) : many_backward<kind>(x); \
  }                                                                                   \
  }
