/* Runs a model on samples in flash, and prints the instructions and the stack that it took, and its outputs.
 *
 * QEMU advances its clock by 2^6 ns with each instruction (-icount shift=6), and the timer of the board counts at 25 MHz,
 * 1.6 times an instruction. */

#include <stdint.h>

#include MODEL_HEADER
#include "samples.h"

#define TIMER ((volatile uint32_t *)0x40000000u) /* CMSDK timer 0: control, value, reload */
#define PAINT 0xA5A5A5A5u

extern uint32_t _stack_limit, _stack_top;
extern void say(const char *text);

static uint32_t ticks(void) { return ~TIMER[1]; }

static uint32_t instructions(uint32_t counted) { return (uint32_t)(((uint64_t)counted * 5 + 4) / 8); }

static void say_hexadecimal(uint32_t number, int digits) {
    char text[9];
    text[digits] = 0;
    for (; digits > 0; number >>= 4) text[--digits] = "0123456789abcdef"[number & 15];
    say(text);
}

static void say_entry(const char *name, uint32_t number) {
    say(name);
    say(" ");
    say_hexadecimal(number, 8);
    say("\n");
}

static void paint(void) {
    uint32_t here;
    for (volatile uint32_t *at = &_stack_limit; at < &here - 64; ++at) *at = PAINT;
}

static uint32_t stack_used(void) {
    const volatile uint32_t *at = &_stack_limit;
    while (*at == PAINT) ++at;
    return (uint32_t)((char *)&_stack_top - (char *)at);
}

static uint32_t started;

void layer_starts(unsigned number) {
    say_entry("layer", number);
    started = ticks();
}

void layer_ends(void) {
    uint32_t now = ticks();
    say_entry("took", instructions(now - started));
}

int main(void) {
    TIMER[0] = 0;
    TIMER[2] = TIMER[1] = 0xFFFFFFFFu;
    TIMER[0] = 1;
    for (unsigned sample = 0; sample < SAMPLES; ++sample) {
        GIVE(sample)
        paint();
        uint32_t before = ticks();
        RUN();
        uint32_t counted = ticks() - before;
        say_entry("instructions", instructions(counted));
        say_entry("stack", stack_used());
        const unsigned char *bytes = (const unsigned char *)OUTPUT;
        say("output ");
        for (unsigned place = 0; place < OUTPUT_BYTES; ++place) say_hexadecimal(bytes[place], 2);
        say("\n");
    }
    return 0;
}
