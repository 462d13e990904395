/* From reset to main of a Cortex-M: vectors, memory, floating-point unit, and what the C library asks of a system. */
#include <stddef.h>
#include <stdint.h>

#include "board.h"

extern uint32_t linked_data_from[], linked_data[], linked_data_end[], linked_bss[], linked_bss_end[],
    linked_stack[];
extern int main(void);
extern void __libc_init_array(void);

void Reset_Handler(void);
void Fault_Handler(void);
void* __dso_handle = NULL;

__attribute__((section(".vectors"), used)) static const void* const vectors[16] = {
    linked_stack,         (void*)Reset_Handler, (void*)Fault_Handler, (void*)Fault_Handler,
    (void*)Fault_Handler, (void*)Fault_Handler, (void*)Fault_Handler};

void Reset_Handler(void) {
  *(volatile uint32_t*)0xe000ed88 |= 0xf << 20; /* CPACR: full access to the floating-point unit */
  __asm__ volatile("dsb\n isb");
  for (uint32_t *from = linked_data_from, *to = linked_data; to < linked_data_end;) *to++ = *from++;
  for (uint32_t* to = linked_bss; to < linked_bss_end;) *to++ = 0;
  __libc_init_array();
  board_exit(main());
  for (;;) continue;
}

void Fault_Handler(void) {
  board_print("fault\n");
  board_exit(3);
  for (;;) continue;
}

/* Of the C library: abort() ends here; nothing is ever opened, and nothing runs at the end. */
void _exit(int code) {
  board_exit(code);
  for (;;) continue;
}
int _kill(int process, int signal) {
  (void)process;
  (void)signal;
  board_print("aborted\n");
  _exit(4);
  return -1;
}
void __assert_func(const char* file, int line, const char* function, const char* what) {
  (void)file;
  (void)line;
  (void)function;
  board_print(what);
  _exit(4);
}
int _getpid(void) { return 1; }
void _init(void) {}
void _fini(void) {}
int __cxa_atexit(void (*run)(void*), void* argument, void* handle) {
  (void)run;
  (void)argument;
  (void)handle;
  return 0;
}
