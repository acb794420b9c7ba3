// Entry points of selftest.cu; each returns null, or the text of an error.
#pragma once
#include <cstdint>

namespace ovseg::selftest {

const char* reverse(const float* x, float* y, int blocks, bool barrier);
const char* tree(const float* x, float* y, bool race);
const char* warps(const float* x, float* y, float* counts);
const char* blocks(const float* x, float* y);
const char* out_of_bounds(float* y, int64_t index, bool shared);
const char* divergent(int kind, float* y);
const char* copies(const float* x, float* y, int valid, bool early);
const char* product(int kind, const void* a, const void* b, void* c, int64_t depth, bool a_by_k, bool b_by_k,
                    int64_t pitch);
const char* philox_numbers(const int64_t* rng, int64_t first, int64_t count, float* low, float* high, float* gumbel);

}  // namespace ovseg::selftest
