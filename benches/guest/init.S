/* The smallest useful guest: say one byte on the console, if there is one, then reset the machine, or with IDLE wait for ever.
 * What it measures is the way to user space and out again, or the cost of doing nothing; nothing of its own. */
    .globl _start
    .text
_start:
    mov $1, %eax                /* write(1, "I", 1) */
    mov $1, %edi
    lea byte(%rip), %rsi
    mov $1, %edx
    syscall
#ifdef IDLE
1:  mov $34, %eax               /* pause() */
    syscall
    jmp 1b
#else
    mov $169, %eax              /* reboot(MAGIC1, MAGIC2, RB_AUTOBOOT, 0) */
    mov $0xfee1dead, %edi
    mov $672274793, %esi
    mov $0x01234567, %edx
    xor %r10d, %r10d
    syscall
1:  pause
    jmp 1b
#endif
byte:
    .ascii "I"
