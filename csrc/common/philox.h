// Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011), the same on the CPU and in
// device code. Contract of all operators (ovseg_kernels/philox.py): element `index` of the unpadded tensor, in
// contiguous order, takes word index % 4 of the block with key = seed and counter = (offset + index / 4, 0).
#pragma once
#include <cmath>

#include "types.h"

namespace ovseg {

struct Philox {
  uint32_t x[4];
};

OVSEG_ANYWHERE Philox philox(uint64_t key, uint64_t low, uint64_t high = 0) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  Philox c = {{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
               static_cast<uint32_t>(high >> 32)}};
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t(0xD2511F53u) * c.x[0], odd = uint64_t(0xCD9E8D57u) * c.x[2];
    c = {{static_cast<uint32_t>(odd >> 32) ^ c.x[1] ^ k0, static_cast<uint32_t>(odd),
          static_cast<uint32_t>(even >> 32) ^ c.x[3] ^ k1, static_cast<uint32_t>(even)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

OVSEG_ANYWHERE uint32_t philox_bits(int64_t seed, int64_t offset, int64_t index) {
  return philox(static_cast<uint64_t>(seed), static_cast<uint64_t>(offset) + static_cast<uint64_t>(index) / 4)
      .x[index % 4];
}

// 23 bits and a half: exact in float, in [2^-24, 1 - 2^-24], so that no logarithm sees 0 or 1.
OVSEG_ANYWHERE float uniform_from_bits(uint32_t bits) {
  return (static_cast<float>(bits >> 9) + 0.5f) * 1.1920928955078125e-07f;
}

OVSEG_ANYWHERE float gumbel_from_bits(uint32_t bits) { return -logf(-logf(uniform_from_bits(bits))); }

}  // namespace ovseg
