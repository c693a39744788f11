/* Start of a Cortex-M4F program for the machine mps2-an386 of QEMU: vectors, memory, floating-point unit, semihosting. */

#include <stdint.h>

extern uint32_t _data_start, _data_end, _data_load, _bss_start, _bss_end, _stack_top, _stack_limit;

extern int main(void);

#define SYS_WRITE0 4
#define SYS_EXIT 0x18

static void semihosting(int operation, const void *argument) {
    register int r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}

void say(const char *text) { semihosting(SYS_WRITE0, text); }

void leave(int failed) {
    semihosting(SYS_EXIT, (const void *)(failed ? 0x20023u : 0x20026u));
    for (;;) {
    }
}

static void fault(void) {
    say("fault\n");
    leave(1);
}

void reset(void) {
    *(volatile uint32_t *)0xE000ED88u |= 0xFu << 20; /* CPACR: full access to the floating-point unit */
    __asm__ volatile("dsb\n isb");
    for (uint32_t *to = &_data_start, *from = &_data_load; to < &_data_end;) *to++ = *from++;
    for (uint32_t *to = &_bss_start; to < &_bss_end;) *to++ = 0;
    leave(main());
}

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    &_stack_top, reset, fault, fault, fault, fault, fault, 0, 0, 0, 0, fault, fault, 0, fault, fault,
};
