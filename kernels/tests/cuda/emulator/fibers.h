// Fibers: several threads of control that take turns in one thread of the system.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__x86_64__) && defined(__ELF__) && !defined(EMULATED_UCONTEXT)

// The registers that a call must keep are pushed, and the stack pointers exchanged.
extern "C" void emulated_switch(void **from, void *to);
asm(R"(
.text
.weak emulated_switch
.hidden emulated_switch
.type emulated_switch, @function
emulated_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
.size emulated_switch, . - emulated_switch
)");

namespace emulated {
struct Fiber {
    void *stack_pointer = nullptr;

    // Makes it run `entry` when it is first switched to. `entry` never returns.
    void prepare(uint8_t *stack, size_t bytes, void (*entry)()) {
        void **top = reinterpret_cast<void **>(stack + bytes);
        *--top = nullptr;  // so that `entry` finds its stack aligned as after a call
        *--top = reinterpret_cast<void *>(entry);
        for (int i = 0; i < 6; i++) *--top = nullptr;
        stack_pointer = top;
    }
    void switch_to(Fiber &other) { emulated_switch(&stack_pointer, other.stack_pointer); }
};
}  // namespace emulated

#else
#include <ucontext.h>

namespace emulated {
struct Fiber {
    ucontext_t context;

    void prepare(uint8_t *stack, size_t bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void switch_to(Fiber &other) { swapcontext(&context, &other.context); }
};
}  // namespace emulated

#endif

namespace emulated {

// The stacks of a block's threads. Pages that nobody touches take no memory.
class Stacks {
    static constexpr size_t BYTES = 128 << 10;
    static constexpr size_t UNUSED = 4096;  // at the end of each; a thread that has written there has overflowed
    uint8_t *memory = nullptr;
    size_t count = 0;

  public:
    Stacks() = default;
    Stacks(const Stacks &) = delete;
    ~Stacks() { release(); }
    void release() {
        if (memory) munmap(memory, (count + 1) * BYTES);
        memory = nullptr;
        count = 0;
    }
    void reserve(size_t threads) {
        if (threads <= count) return;
        release();
        void *mapped = mmap(nullptr, (threads + 1) * BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) {
            perror("the emulator's stacks");
            abort();
        }
        memory = static_cast<uint8_t *>(mapped);
        count = threads;
#ifdef MADV_NOHUGEPAGE
        madvise(memory, (count + 1) * BYTES, MADV_NOHUGEPAGE);
#endif
    }
    uint8_t *stack(size_t thread) { return memory + (thread + 1) * BYTES; }  // before the first one there is room to overflow into
    // Where the stack begins: not at the same place of a page for all, which would be the same lines of the cache.
    size_t height(size_t thread) { return BYTES - thread % 32 * 576; }
    bool overflowed(size_t thread) {
        const uint64_t *words = reinterpret_cast<const uint64_t *>(stack(thread));
        uint64_t any = 0;
        for (size_t i = 0; i < UNUSED / 8; i++) any |= words[i];
        return any != 0;
    }
};

}  // namespace emulated
