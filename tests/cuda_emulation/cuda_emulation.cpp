// The scheduler: fibers, barriers, guarded memory. One launch at a time, on one CPU thread.
#include "cuda_emulation.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <csetjmp>
#include <csignal>
#include <deque>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

namespace ovseg::emulation {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every float format, -1 as an integer

enum class State { ready, at_barrier, in_warp, done };

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

// A fiber lives for many blocks: its first entry goes through a context of its own, all later switches through
// _longjmp.
struct Fiber {
  Identity id;
  State state = State::done;
  int line = 0;
  unsigned mask = 0;
  std::deque<std::vector<Copy>> groups;  // cp.async groups in flight; the last one is still open
  ucontext_t context;
  jmp_buf resume_at;
  bool started = false;
  std::vector<unsigned char> stack = std::vector<unsigned char>(kStack);
};

struct Warp {
  unsigned char slots[kWarp][kSlotBytes];
};

size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// [guard][slack, bytes][guard]: bytes end where the second guard begins, up to 16-byte alignment of the start. The
// guards are address space that may not be touched, wide enough for an index that is off by a row or a tile.
constexpr size_t kGuard = size_t(16) << 20;
struct Guarded {
  unsigned char *mapping = nullptr, *begin = nullptr;
  size_t mapped = 0, bytes = 0;

  explicit Guarded(size_t bytes_) : bytes(bytes_) {
    const size_t inner = (bytes + 16 + page() - 1) / page() * page();
    mapped = inner + 2 * kGuard;
    void* at = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    mapping = static_cast<unsigned char*>(at);
    mprotect(mapping, kGuard, PROT_NONE);
    mprotect(mapping + kGuard + inner, kGuard, PROT_NONE);
    begin = mapping + kGuard + inner - (bytes + 15) / 16 * 16;
    std::memset(mapping + kGuard, kPoison, inner);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(mapping, mapped); }
  bool intact() const {
    const unsigned char *first = mapping + kGuard, *last = mapping + mapped - kGuard;
    for (const unsigned char* at = first; at < begin; ++at) {
      if (*at != kPoison) return false;
    }
    for (const unsigned char* at = begin + bytes; at < last; ++at) {
      if (*at != kPoison) return false;
    }
    return true;
  }
};

struct Machine {
  std::mt19937_64 random{0};
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<Guarded> shared;
  std::vector<std::shared_ptr<Guarded>> memory;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::string kernel, error;
  std::map<std::string, uint64_t> steps;
  std::vector<std::string> launches;
};
Machine machine;
uint64_t steps = 0;

std::string where(const Fiber& f) {
  std::ostringstream out;
  out << "kernel " << machine.kernel << ", block (" << f.id.block.x << ", " << f.id.block.y << ", " << f.id.block.z
      << "), thread (" << f.id.thread.x << ", " << f.id.thread.y << ", " << f.id.thread.z << ")";
  return out.str();
}

[[noreturn]] void to_scheduler() { _longjmp(machine.scheduler, 1); }

void pause(State state) {
  machine.current->state = state;
  if (_setjmp(machine.current->resume_at) == 0) to_scheduler();
}

void run_bodies() {  // what a fiber does, block after block
  for (;;) {
    (*machine.body)();
    pause(State::done);
  }
}

void resume(Fiber& fiber) {
  machine.current = &fiber;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume_at, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_bodies, 0);
  setcontext(&fiber.context);
}

void on_fault(int, siginfo_t* info, void*) {
  if (!machine.current) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  std::ostringstream out;
  const auto* at = static_cast<unsigned char*>(info->si_addr);
  std::string what = "memory that does not belong to it";
  auto look = [&](const Guarded& g, const char* name) {
    if (at < g.mapping || at >= g.mapping + g.mapped) return;
    what = std::string(name) + ", byte " + std::to_string(at - g.begin) + " of " + std::to_string(g.bytes);
  };
  if (machine.shared) look(*machine.shared, "shared memory");
  for (const auto& g : machine.memory) look(*g, "a global buffer");
  out << where(*machine.current) << ": out-of-bounds access to " << what;
  machine.error = out.str();
  to_scheduler();
}

unsigned flat(const Identity& id) {
  return id.thread.x + id.block_size.x * (id.thread.y + id.block_size.y * id.thread.z);
}

void run_block(dim3 at, dim3 grid, dim3 size) {
  const unsigned count = size.x * size.y * size.z;
  std::vector<Fiber*> ready;
  for (unsigned i = 0; i < count; ++i) {
    Fiber& f = *machine.fibers[i];
    f.id = {dim3(i % size.x, i / size.x % size.y, i / size.x / size.y), at, size, grid};
    f.state = State::ready;
    f.groups.assign(1, {});
    ready.push_back(&f);
  }
  if (machine.shared) std::memset(machine.shared->begin, kPoison, machine.shared->bytes);
  unsigned done = 0, waiting = 0;
  while (done < count) {
    if (ready.empty()) {
      for (unsigned i = 0; i < count; ++i) {
        Fiber& f = *machine.fibers[i];
        if (f.state == State::done) continue;
        machine.current = &f;
        machine.error =
            where(f) + ": divergent " +
            (f.state == State::at_barrier ? "__syncthreads, line " + std::to_string(f.line) : "warp operation") +
            "; not all threads arrive (" + std::to_string(waiting) + " of " + std::to_string(count) +
            " wait at a block barrier, " + std::to_string(done) + " have ended)";
        return;
      }
    }
    const size_t pick = machine.random() % ready.size();
    Fiber& f = *ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    resume(f);
    if (!machine.error.empty()) return;
    if (f.state == State::done) ++done;
    if (f.state == State::at_barrier && ++waiting == count) {
      for (unsigned i = 0; i < count; ++i) {
        Fiber& other = *machine.fibers[i];
        if (other.line != f.line) {
          machine.error = where(other) + ": waits at the __syncthreads of line " + std::to_string(other.line) +
                          " while another thread of its block waits at line " + std::to_string(f.line);
          return;
        }
        other.state = State::ready;
        ready.push_back(&other);
      }
      waiting = 0;
    }
    if (f.state == State::in_warp) {
      const unsigned first = flat(f.id) / kWarp * kWarp;
      unsigned arrived = 0;
      for (unsigned i = 0; i < kWarp && first + i < count; ++i) {
        const Fiber& other = *machine.fibers[first + i];
        if (other.state == State::in_warp && other.mask == f.mask) arrived |= 1u << i;
      }
      if ((arrived & f.mask) == f.mask) {
        for (unsigned i = 0; i < kWarp; ++i) {
          if (!(f.mask >> i & 1)) continue;
          machine.fibers[first + i]->state = State::ready;
          ready.push_back(machine.fibers[first + i].get());
        }
      }
    }
  }
}

}  // namespace

const Identity& identity() { return machine.current->id; }
int lane() { return static_cast<int>(flat(machine.current->id) % kWarp); }
unsigned char* warp_slot(int lane) { return machine.warps[flat(machine.current->id) / kWarp].slots[lane]; }
unsigned char* dynamic_shared() { return machine.shared->begin; }
void set_seed(uint64_t seed) { machine.random.seed(seed); }

void block_barrier(int line) {
  machine.current->line = line;
  pause(State::at_barrier);
}

void warp_barrier(unsigned mask) {
  if (!(mask >> lane() & 1)) fail("a lane takes part in a warp operation whose mask leaves it out");
  machine.current->mask = mask;
  pause(State::in_warp);
}

void fail(const std::string& message) {
  machine.error = where(*machine.current) + ": " + message;
  to_scheduler();
}

void copy_async(void* shared, const void* global, int bytes, int valid) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes || (valid && reinterpret_cast<uintptr_t>(global) % bytes)) {
    fail("cp.async of " + std::to_string(bytes) + " bytes at an address that is not a multiple of it");
  }
  machine.current->groups.back().push_back({shared, global, bytes, valid});
}
void commit_async() { machine.current->groups.emplace_back(); }
void wait_async(int pending) {
  auto& groups = machine.current->groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {  // the open group does not count
    for (const Copy& copy : groups.front()) {
      if (copy.valid) std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(static_cast<unsigned char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
    }
    groups.pop_front();
  }
}

std::map<std::string, uint64_t> take_steps() { return std::exchange(machine.steps, {}); }
std::vector<std::string> take_launches() { return std::exchange(machine.launches, {}); }

const char* launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const unsigned count = block.x * block.y * block.z;
  machine.kernel = name, machine.error.clear(), machine.body = &body;
  if (count == 0 || count > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    machine.error = "kernel " + machine.kernel + ": a launch that CUDA would refuse";
    return machine.error.c_str();
  }
  machine.launches.push_back(machine.kernel);
  machine.shared = shared_bytes ? std::make_unique<Guarded>(shared_bytes) : nullptr;
  machine.warps.resize((count + kWarp - 1) / kWarp);
  while (machine.fibers.size() < count) machine.fibers.push_back(std::make_unique<Fiber>());
  const uint64_t steps_before = steps;
  struct sigaction action{}, before{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before);
  for (unsigned z = 0; z < grid.z && machine.error.empty(); ++z) {
    for (unsigned y = 0; y < grid.y && machine.error.empty(); ++y) {
      for (unsigned x = 0; x < grid.x && machine.error.empty(); ++x) run_block(dim3(x, y, z), grid, block);
    }
  }
  sigaction(SIGSEGV, &before, nullptr);
  if (machine.shared && machine.error.empty() && !machine.shared->intact()) {
    machine.error = "kernel " + machine.kernel + ": wrote outside its shared memory";
  }
  machine.current = nullptr, machine.body = nullptr;
  machine.steps[machine.kernel] += steps - steps_before;
  if (!machine.error.empty()) machine.fibers.clear();  // some stopped in the middle
  return machine.error.empty() ? nullptr : machine.error.c_str();
}

std::shared_ptr<unsigned char> allocate(size_t bytes) {
  machine.memory.push_back(std::make_shared<Guarded>(bytes));
  return {machine.memory.back(), machine.memory.back()->begin};
}

std::string release_all() {
  std::string found;
  for (const auto& g : machine.memory) {
    if (!g->intact()) found = "a kernel wrote outside a global buffer of " + std::to_string(g->bytes) + " bytes";
  }
  machine.memory.clear();
  return found;
}

}  // namespace ovseg::emulation

// The compiler calls this at every basic block of the kernels (-fsanitize-coverage=trace-pc).
extern "C" void __sanitizer_cov_trace_pc() { ++ovseg::emulation::steps; }
