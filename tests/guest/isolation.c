/* Can user code reach the kernel, and does the CPU behave as on hardware? On a PVM host the guest kernel runs at the
 * same hardware privilege level as its processes, so nothing here may be taken for granted.
 */
#include "guest.h"
#include <asm/prctl.h>
#include <cpuid.h>
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stddef.h>
#include <sys/auxv.h>
#include <sys/ptrace.h>
#include <sys/time.h>
#include <sys/user.h>
#include <ucontext.h>

static sigjmp_buf resume;
static volatile sig_atomic_t caught;
static char alternate_stack[65536];

static void catch_fault(int number)
{
	caught = number;
	siglongjmp(resume, 1);
}

static void catch_all(void)
{
	static const int signals[] = { SIGSEGV, SIGILL, SIGFPE, SIGTRAP, SIGBUS };
	struct sigaction action = { .sa_handler = catch_fault, .sa_flags = SA_NODEFER | SA_ONSTACK };
	stack_t stack = { .ss_sp = alternate_stack, .ss_size = sizeof(alternate_stack) };

	sigaltstack(&stack, NULL);
	for (int i = 0; i < COUNT(signals); i++)
		sigaction(signals[i], &action, NULL);
}

/* Runs the statement; the signal it raised in `caught`, or 0. */
#define TRY(...)                                                              \
	do {                                                                  \
		caught = 0;                                                   \
		if (!sigsetjmp(resume, 1)) {                                  \
			__VA_ARGS__;                                          \
		}                                                             \
	} while (0)

#define MUST_RAISE(number, ...)                                               \
	do {                                                                  \
		TRY(__VA_ARGS__);                                             \
		if (caught != (number)) {                                     \
			errno = 0;                                            \
			return why("%s: signal %d instead of %d",             \
				   #__VA_ARGS__, (int)caught, number);        \
		}                                                             \
	} while (0)

/* --- memory --- */

static int readable(unsigned long address)
{
	TRY((void)*(volatile char *)address);
	return caught == 0;
}

static int writable(unsigned long address)
{
	TRY(*(volatile char *)address = 0);
	return caught == 0;
}

static int runnable(unsigned long address)
{
	TRY(((void (*)(void))address)());
	return caught == 0;
}

#define VSYSCALL 0xffffffffff600000ul

static const char *probe(unsigned long address)
{
	if (readable(address) && address != VSYSCALL)
		return why("user code reads kernel memory at %lx", address);
	if (writable(address))
		return why("user code writes kernel memory at %lx", address);
	if (address != VSYSCALL && runnable(address))
		return why("user code jumps into kernel memory at %lx", address);
	return NULL;
}

/* The kernel's half: each of its 256 top-level entries at three places, and the image's gigabyte every 2 MiB. */
static const char *kernel_half_is_out_of_reach(void)
{
	const char *wrong;

	catch_all();
	for (unsigned long base = 0xffff800000000000ul; base; base += 1ul << 39) {
		const unsigned long inside[] = { 0, 0x1000, 0x100000, 0x40000000ul, (1ul << 39) - 0x1000 };

		for (int i = 0; i < COUNT(inside); i++)
			if ((wrong = probe(base + inside[i])))
				return wrong;
	}
	for (unsigned long address = 0xffffffff80000000ul; address < 0xffffffffc0000000ul; address += 0x200000)
		if ((wrong = probe(address)) || (wrong = probe(address + 0x1000)))
			return wrong;
	/* CPU entry areas, fixmap, descriptor tables. */
	for (unsigned long address = 0xfffffe0000000000ul; address < 0xfffffe0000080000ul; address += 0x1000)
		if ((wrong = probe(address)))
			return wrong;
	for (unsigned long address = 0xffffffffff000000ul; address > 0xffffffff00000000ul; address += 0x5000)
		if ((wrong = probe(address)))
			return wrong;
	return NULL;
}

static const char *kernel_symbols_are_out_of_reach(void)
{
	static const char *const names[] = { " T _stext", " D _sdata", " B __bss_start", " D init_task", " T start_kernel" };
	FILE *symbols = fopen("/proc/kallsyms", "r");
	char line[256];
	const char *wrong = NULL;
	int found = 0;

	NEED(symbols);
	catch_all();
	while (!wrong && fgets(line, sizeof(line), symbols)) {
		line[strcspn(line, "\n")] = 0;
		for (int i = 0; i < COUNT(names); i++)
			if (strlen(line) > 16 && !strcmp(line + 16, names[i])) {
				unsigned long address = strtoul(line, NULL, 16);

				if (address) {
					found++;
					wrong = probe(address);
				}
			}
	}
	fclose(symbols);
	if (!wrong && !found) {
		errno = 0;
		return why("no kernel symbol to probe");
	}
	return wrong;
}

static const char *descriptor_tables_are_out_of_reach(void)
{
	struct { uint16_t limit; uint64_t base; } __attribute__((packed)) table = { 0, 0 };

	catch_all();
	TRY(asm volatile("sgdt %0" : "=m"(table)));
	if (!caught && table.base && readable(table.base))
		return why("the GDT at %lx can be read", (unsigned long)table.base);
	TRY(asm volatile("sidt %0" : "=m"(table)));
	if (!caught && table.base && (readable(table.base) || writable(table.base)))
		return why("the IDT at %lx can be reached", (unsigned long)table.base);
	return NULL;
}

static const char *protections_hold(void)
{
	static const unsigned char ret = 0xc3;
	char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	NEED(page != MAP_FAILED);
	catch_all();
	page[0] = ret;
	MUST_RAISE(SIGSEGV, ((void (*)(void))page)());
	NEED(!mprotect(page, 4096, PROT_READ));
	MUST_RAISE(SIGSEGV, *(volatile char *)page = 1);
	NEED(!mprotect(page, 4096, PROT_READ | PROT_EXEC));
	((void (*)(void))page)();
	NEED(!mprotect(page, 4096, PROT_NONE));
	MUST_RAISE(SIGSEGV, (void)*(volatile char *)page);
	MUST_RAISE(SIGSEGV, *(volatile int *)8 = 1);
	MUST_RAISE(SIGSEGV, (void)*(volatile char *)0x8000000000000000ul);
	return NULL;
}

/* --- privileged instructions --- */

static const char *privileged_instructions_fault(void)
{
	static uint64_t memory[4];

	catch_all();
	MUST_RAISE(SIGSEGV, asm volatile("cli"));
	MUST_RAISE(SIGSEGV, asm volatile("sti"));
	MUST_RAISE(SIGSEGV, asm volatile("hlt"));
	MUST_RAISE(SIGSEGV, asm volatile("outb %%al, $0x80" ::"a"(0)));
	MUST_RAISE(SIGSEGV, asm volatile("inb $0x71, %%al" ::: "rax"));
	MUST_RAISE(SIGSEGV, asm volatile("mov %%cr0, %%rax" ::: "rax"));
	MUST_RAISE(SIGSEGV, asm volatile("mov %%cr2, %%rax" ::: "rax"));
	MUST_RAISE(SIGSEGV, asm volatile("mov %%cr3, %%rax" ::: "rax"));
	MUST_RAISE(SIGSEGV, asm volatile("mov %%cr4, %%rax" ::: "rax"));
	MUST_RAISE(SIGSEGV, asm volatile("mov %0, %%cr3" ::"r"(0ul)));
	MUST_RAISE(SIGSEGV, asm volatile("mov %%dr7, %%rax" ::: "rax"));
	MUST_RAISE(SIGSEGV, asm volatile("clts"));
	MUST_RAISE(SIGSEGV, asm volatile("lmsw %%ax" ::"a"(0)));
	MUST_RAISE(SIGSEGV, asm volatile("swapgs"));
	MUST_RAISE(SIGSEGV, asm volatile("sysretq"));
	MUST_RAISE(SIGSEGV, asm volatile("lgdt %0" ::"m"(memory)));
	MUST_RAISE(SIGSEGV, asm volatile("lidt %0" ::"m"(memory)));
	MUST_RAISE(SIGSEGV, asm volatile("lldt %%ax" ::"a"(0x28)));
	MUST_RAISE(SIGSEGV, asm volatile("ltr %%ax" ::"a"(0x40)));
	MUST_RAISE(SIGSEGV, asm volatile("invlpg %0" ::"m"(memory)));
	MUST_RAISE(SIGSEGV, asm volatile("wbinvd"));
	MUST_RAISE(SIGSEGV, asm volatile("invd"));
	MUST_RAISE(SIGSEGV, asm volatile("rdmsr" ::"c"(0xc0000080) : "rax", "rdx"));
	MUST_RAISE(SIGSEGV, asm volatile("wrmsr" ::"c"(0xc0000082), "a"(0), "d"(0)));
	/* The PVM backend's own registers: a process that could write them would own its vCPU. */
	MUST_RAISE(SIGSEGV, asm volatile("rdmsr" ::"c"(0x4b564d10) : "rax", "rdx"));
	MUST_RAISE(SIGSEGV, asm volatile("wrmsr" ::"c"(0x4b564d10), "a"(0), "d"(0)));
	return NULL;
}

/* Far transfers to kernel selectors, and to the selector that returns to user space on a PVM host. */
static const char *kernel_selectors_are_refused(void)
{
	static const unsigned short code[] = { 0x08, 0x10, 0x13 }, stack[] = { 0x18, 0x10, 0x20 };

	catch_all();
	for (volatile int i = 0; i < COUNT(code); i++)
		MUST_RAISE(SIGSEGV, asm volatile("pushq %0; lea 1f(%%rip), %%rax; push %%rax; lretq; 1: add $0, %%rax"
						 ::"r"((unsigned long)code[i]) : "rax", "memory"));
	for (volatile int i = 0; i < COUNT(stack); i++)
		MUST_RAISE(SIGSEGV, asm volatile("mov %%rsp, %%rcx; pushq %0; push %%rcx; pushf; pushq %1; lea 1f(%%rip), %%rax;"
						 "push %%rax; iretq; 1:"
						 ::"r"((unsigned long)stack[i]), "r"(0x10ul) : "rax", "rcx", "memory"));
	MUST_RAISE(SIGSEGV, asm volatile("mov %%rsp, %%rcx; pushq $0x3b; push %%rcx; pushf; pushq $0x33; lea 1f(%%rip), %%rax;"
					 "push %%rax; iretq; 1:" ::: "rax", "rcx", "memory"));
	MUST_RAISE(SIGSEGV, asm volatile("int $0x41"));
	MUST_RAISE(SIGSEGV, asm volatile("int $0xec"));
	return NULL;
}

static const char *exceptions_become_the_right_signals(void)
{
	unsigned int mxcsr = 0x1f80 & ~0x200u;
	unsigned short control = 0x37f & ~0x04;

	catch_all();
	MUST_RAISE(SIGILL, asm volatile("ud2"));
	MUST_RAISE(SIGTRAP, asm volatile("int3"));
	MUST_RAISE(SIGTRAP, asm volatile(".byte 0xf1"));
	MUST_RAISE(SIGFPE, asm volatile("xor %%ecx, %%ecx; mov $1, %%eax; cltd; idiv %%ecx" ::: "rax", "rcx", "rdx"));
	MUST_RAISE(SIGFPE, asm volatile("ldmxcsr %0; pxor %%xmm0, %%xmm0; mov $1, %%eax; cvtsi2sd %%eax, %%xmm1;"
					"divsd %%xmm0, %%xmm1" ::"m"(mxcsr) : "rax", "xmm0", "xmm1"));
	mxcsr = 0x1f80;
	asm volatile("ldmxcsr %0" ::"m"(mxcsr));
	MUST_RAISE(SIGFPE, asm volatile("fldcw %0; fldz; fld1; fdivp; fwait" ::"m"(control)));
	asm volatile("fninit");
	MUST_RAISE(SIGTRAP, asm volatile("pushf; orl $0x100, (%%rsp); popf; nop; nop" ::: "memory"));
	return NULL;
}

static const char *interrupt_flag_cannot_be_cleared(void)
{
	unsigned long flags;

	asm volatile("pushf; andl $~0x200, (%%rsp); popf; pushf; pop %0" : "=r"(flags)::"memory");
	errno = 0;
	if (!(flags & 0x200))
		return why("popf cleared IF");
	asm volatile("pushf; orl $0x3000, (%%rsp); popf; pushf; pop %0" : "=r"(flags)::"memory");
	return flags & 0x3000 ? why("popf raised IOPL") : NULL;
}

/* --- what a debugger or a signal handler may set --- */

static void claim_kernel_selectors(int number, siginfo_t *info, void *context)
{
	greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;

	(void)number;
	(void)info;
	registers[REG_CSGSFS] = (registers[REG_CSGSFS] & ~0xfffful) | 0x10;
	registers[REG_EFL] |= 0x3000;
}

static const char *sigreturn_cannot_enter_the_kernel(void)
{
	pid_t child = fork();
	int status;

	NEED(child >= 0);
	if (child == 0) {
		struct sigaction action = { .sa_sigaction = claim_kernel_selectors, .sa_flags = SA_SIGINFO };
		unsigned long selector, flags;

		sigaction(SIGUSR1, &action, NULL);
		raise(SIGUSR1);
		asm volatile("mov %%cs, %0; pushf; pop %1" : "=r"(selector), "=r"(flags));
		_exit((selector & 3) == 3 && !(flags & 0x3000) ? 0 : 1);
	}
	NEED(waitpid(child, &status, 0) == child);
	errno = 0;
	/* Either the selector is forced to the user's, or the frame is refused. */
	if ((WIFEXITED(status) && WEXITSTATUS(status) == 0) || (WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV))
		return NULL;
	return why("status %x", status);
}

static const char *debugger_cannot_set_kernel_selectors(void)
{
	struct user_regs_struct registers;
	int status;
	pid_t child = fork();

	NEED(child >= 0);
	if (child == 0) {
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		raise(SIGSTOP);
		_exit(0);
	}
	NEED(waitpid(child, &status, 0) == child && WIFSTOPPED(status));
	NEED(!ptrace(PTRACE_GETREGS, child, NULL, &registers));
	registers.cs = 0x10;
	NEED(ptrace(PTRACE_SETREGS, child, NULL, &registers) == -1);
	NEED(!ptrace(PTRACE_GETREGS, child, NULL, &registers));
	registers.gs_base = 0xffffffff81000000ul;
	NEED(ptrace(PTRACE_SETREGS, child, NULL, &registers) == -1);
	kill(child, SIGKILL);
	return NULL;
}

/* --- stepping and breakpoints --- */

static const char *single_step_counts_every_instruction(void)
{
	struct user_regs_struct registers;
	int status, steps = 0;
	pid_t child = fork();

	NEED(child >= 0);
	if (child == 0) {
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		/* The stop, then 1000 instructions and system calls between two markers, then exit. */
		raise(SIGSTOP);
		asm volatile("int3\n mov $100, %%ebx\n"
			     "1: mov $39, %%eax\n syscall\n nop\n nop\n nop\n nop\n nop\n nop\n dec %%ebx\n jnz 1b\n int3"
			     ::: "rax", "rbx", "rcx", "r11", "memory");
		_exit(0);
	}
	NEED(waitpid(child, &status, 0) == child && WIFSTOPPED(status));
	NEED(!ptrace(PTRACE_CONT, child, NULL, NULL));
	NEED(waitpid(child, &status, 0) == child && WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP);
	for (;;) {
		NEED(!ptrace(PTRACE_SINGLESTEP, child, NULL, NULL));
		NEED(waitpid(child, &status, 0) == child);
		NEED(WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP);
		NEED(!ptrace(PTRACE_GETREGS, child, NULL, &registers));
		if ((ptrace(PTRACE_PEEKTEXT, child, registers.rip - 1, NULL) & 0xff) == 0xcc)
			break;
		if (++steps > 2000)
			break;
	}
	kill(child, SIGKILL);
	errno = 0;
	return steps == 1001 ? NULL : why("%d steps instead of 1001", steps);
}

static volatile long watched;

/* A watchpoint that never fires would be worse than none: on a PVM host debug registers are not loaded, so the kernel must
 * refuse to set one, and the debugger falls back on stepping.
 */
static const char *hardware_watchpoint_fires_or_is_refused(void)
{
	struct user_regs_struct registers;
	int status;
	pid_t child = fork();

	NEED(child >= 0);
	if (child == 0) {
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		raise(SIGSTOP);
		watched = 7;
		_exit(0);
	}
	NEED(waitpid(child, &status, 0) == child && WIFSTOPPED(status));
	if (ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg[0]), &watched) ||
	    ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg[7]), 0xd0001ul)) {
		kill(child, SIGKILL);
		return errno == EOPNOTSUPP || errno == ENOSPC ? NULL : why("refused for another reason:");
	}
	NEED(!ptrace(PTRACE_CONT, child, NULL, NULL));
	NEED(waitpid(child, &status, 0) == child);
	errno = 0;
	if (!WIFSTOPPED(status) || WSTOPSIG(status) != SIGTRAP) {
		kill(child, SIGKILL);
		return why("no trap, status %x", status);
	}
	NEED(!ptrace(PTRACE_GETREGS, child, NULL, &registers));
	NEED(ptrace(PTRACE_PEEKDATA, child, &watched, NULL) == 7);
	kill(child, SIGKILL);
	return NULL;
}

/* A kernel address in a debug register would let a process watch the kernel. */
static const char *watchpoint_on_kernel_memory_is_refused(void)
{
	int status;
	pid_t child = fork();

	NEED(child >= 0);
	if (child == 0) {
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		raise(SIGSTOP);
		_exit(0);
	}
	NEED(waitpid(child, &status, 0) == child && WIFSTOPPED(status));
	if (!ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg[0]), 0xffffffff81000000ul)) {
		errno = 0;
		NEED(ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg[7]), 0xd0001ul) == -1);
	}
	kill(child, SIGKILL);
	return NULL;
}

/* --- registers across switches, signals and system calls --- */

static const char *system_call_keeps_registers(void)
{
	for (unsigned long round = 0; round < 5000; round++) {
		unsigned long b = round * 0x9e3779b97f4a7c15ul, wrong = 0;

		asm volatile("mov %[b], %%rbx; mov %[b], %%rdi; mov %[b], %%rsi; mov %[b], %%rdx; mov %[b], %%r8; mov %[b], %%r9;"
			     "mov %[b], %%r10; mov %[b], %%r12; mov %[b], %%r13; mov %[b], %%r14; mov %[b], %%r15;"
			     "mov $39, %%eax; syscall;"
			     "xor %%eax, %%eax;"
			     "xor %[b], %%rbx; or %%rbx, %%rax; xor %[b], %%rdi; or %%rdi, %%rax; xor %[b], %%rsi; or %%rsi, %%rax;"
			     "xor %[b], %%rdx; or %%rdx, %%rax; xor %[b], %%r8; or %%r8, %%rax; xor %[b], %%r9; or %%r9, %%rax;"
			     "xor %[b], %%r10; or %%r10, %%rax; xor %[b], %%r12; or %%r12, %%rax; xor %[b], %%r13; or %%r13, %%rax;"
			     "xor %[b], %%r14; or %%r14, %%rax; xor %[b], %%r15; or %%r15, %%rax;"
			     : "=&a"(wrong)
			     : [b] "m"(b)
			     : "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
		if (wrong) {
			errno = 0;
			return why("bits %lx differ in round %lu", wrong, round);
		}
	}
	return NULL;
}

#define VECTORS 16

__attribute__((target("avx"))) static void load_avx(const unsigned char *pattern)
{
#define LOAD(n) asm volatile("vmovdqu %0, %%ymm" #n ::"m"(*(const char(*)[32])(pattern + (n) * 64)));
	LOAD(0) LOAD(1) LOAD(2) LOAD(3) LOAD(4) LOAD(5) LOAD(6) LOAD(7)
	LOAD(8) LOAD(9) LOAD(10) LOAD(11) LOAD(12) LOAD(13) LOAD(14) LOAD(15)
#undef LOAD
}

__attribute__((target("avx"))) static void store_avx(unsigned char *pattern)
{
#define STORE(n) asm volatile("vmovdqu %%ymm" #n ", %0" : "=m"(*(char(*)[32])(pattern + (n) * 64)));
	STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5) STORE(6) STORE(7)
	STORE(8) STORE(9) STORE(10) STORE(11) STORE(12) STORE(13) STORE(14) STORE(15)
#undef STORE
}

__attribute__((target("avx512f"))) static void load_avx512(const unsigned char *pattern)
{
#define LOAD(n) asm volatile("vmovdqu64 %0, %%zmm" #n ::"m"(*(const char(*)[64])(pattern + (n) * 64)));
	LOAD(0) LOAD(1) LOAD(2) LOAD(3) LOAD(4) LOAD(5) LOAD(6) LOAD(7)
	LOAD(24) LOAD(25) LOAD(26) LOAD(27) LOAD(28) LOAD(29) LOAD(30) LOAD(31)
#undef LOAD
	asm volatile("kmovw %0, %%k5" ::"r"((unsigned)pattern[0] | pattern[1] << 8));
}

__attribute__((target("avx512f"))) static void store_avx512(unsigned char *pattern)
{
	unsigned mask;

#define STORE(n) asm volatile("vmovdqu64 %%zmm" #n ", %0" : "=m"(*(char(*)[64])(pattern + (n) * 64)));
	STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5) STORE(6) STORE(7)
	STORE(24) STORE(25) STORE(26) STORE(27) STORE(28) STORE(29) STORE(30) STORE(31)
#undef STORE
	asm volatile("kmovw %%k5, %0" : "=r"(mask));
	pattern[0] = mask;
	pattern[1] = mask >> 8;
}

static int vector_level(void)
{
	__builtin_cpu_init();
	if (__builtin_cpu_supports("avx512f"))
		return 2;
	return __builtin_cpu_supports("avx") ? 1 : 0;
}

static void load_vectors(int level, const unsigned char *pattern)
{
	if (level == 2)
		load_avx512(pattern);
	else if (level == 1)
		load_avx(pattern);
}

static void store_vectors(int level, unsigned char *pattern)
{
	if (level == 2)
		store_avx512(pattern);
	else if (level == 1)
		store_avx(pattern);
}

/* Fills the registers, lets go in the given way, and counts the bytes that came back different. */
static long vectors_after(int level, unsigned seed, int rounds, void (*let_go)(void))
{
	static __thread unsigned char before[2048], after[2048];
	long wrong = 0;

	for (int round = 0; round < rounds; round++) {
		for (int i = 0; i < 2048; i++)
			before[i] = seed * 31 + i * 7 + round;
		memcpy(after, before, sizeof(after));
		load_vectors(level, before);
		let_go();
		store_vectors(level, after);
		for (int i = 0; i < 2048; i++)
			wrong += before[i] != after[i];
	}
	return wrong;
}

static void yield_raw(void)
{
	long result;

	asm volatile("syscall" : "=a"(result) : "a"(SYS_sched_yield) : "rcx", "r11", "memory");
}

static const char *vectors_survive_switches(void)
{
	int level = vector_level(), children = 6, wrong = 0, status;

	for (int i = 0; i < children; i++)
		if (fork() == 0)
			_exit(vectors_after(level, i + 1, 500, yield_raw) != 0);
	for (int i = 0; i < children; i++) {
		NEED(wait(&status) > 0);
		wrong += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
	}
	errno = 0;
	return wrong ? why("%d of %d processes saw other registers (level %d)", wrong, children, level) : NULL;
}

static void scribble(int number)
{
	static unsigned char junk[2048];

	memset(junk, 0xa5 + number, sizeof(junk));
	load_vectors(vector_level(), junk);
}

static void signal_self_raw(void)
{
	long result;

	asm volatile("syscall" : "=a"(result) : "a"(SYS_kill), "D"((long)getpid()), "S"((long)SIGUSR1) : "rcx", "r11", "memory");
}

static const char *vectors_survive_signals(void)
{
	struct sigaction action = { .sa_handler = scribble };
	struct itimerval often = { { 0, 1000 }, { 0, 1000 } };
	long wrong;

	NEED(!sigaction(SIGUSR1, &action, NULL));
	NEED(!sigaction(SIGVTALRM, &action, NULL));
	NEED(!setitimer(ITIMER_VIRTUAL, &often, NULL));
	wrong = vectors_after(vector_level(), 99, 1500, signal_self_raw);
	errno = 0;
	return wrong ? why("%ld bytes differ", wrong) : NULL;
}

static const char *floating_point_control_is_per_process(void)
{
	int status, wrong = 0;

	for (int i = 0; i < 4; i++)
		if (fork() == 0) {
			unsigned int mxcsr = 0x1f80 | (unsigned)i << 13, read_mxcsr;
			unsigned short control = 0x37f & ~0xc00, read_control;
			int bad = 0;

			control |= i << 10;
			asm volatile("ldmxcsr %0; fldcw %1" ::"m"(mxcsr), "m"(control));
			for (int round = 0; round < 500; round++) {
				yield_raw();
				asm volatile("stmxcsr %0; fnstcw %1" : "=m"(read_mxcsr), "=m"(read_control));
				bad |= (read_mxcsr ^ mxcsr) & 0x6000 || read_control != control;
			}
			_exit(bad);
		}
	for (int i = 0; i < 4; i++) {
		NEED(wait(&status) > 0);
		wrong |= status;
	}
	errno = 0;
	return wrong ? why("rounding mode leaked") : NULL;
}

static const char *segment_bases_are_per_process(void)
{
	int status, wrong = 0;

	for (int i = 0; i < 4; i++)
		if (fork() == 0) {
			unsigned long base = 0x10000000ul * (i + 1), read_base = 0, fs_before = 0, fs_after = 0;
			int bad = 0;

			syscall(SYS_arch_prctl, ARCH_GET_FS, &fs_before);
			syscall(SYS_arch_prctl, ARCH_SET_GS, base);
			for (int round = 0; round < 500; round++) {
				yield_raw();
				syscall(SYS_arch_prctl, ARCH_GET_GS, &read_base);
				syscall(SYS_arch_prctl, ARCH_GET_FS, &fs_after);
				bad |= read_base != base || fs_after != fs_before;
			}
			/* The kernel's address range is refused. */
			bad |= syscall(SYS_arch_prctl, ARCH_SET_GS, 0xffffffff81000000ul) == 0;
			_exit(bad);
		}
	for (int i = 0; i < 4; i++) {
		NEED(wait(&status) > 0);
		wrong |= status;
	}
	errno = 0;
	return wrong ? why("a segment base leaked or was lost") : NULL;
}

__attribute__((target("fsgsbase"))) static const char *write_gs_base_natively(void)
{
	unsigned long base = 0x5550000000ul, kernel = 0xffffffff81000000ul;

	for (int round = 0; round < 500; round++) {
		asm volatile("wrgsbase %0" ::"r"(base + round));
		yield_raw();
		if (_readgsbase_u64() != base + round) {
			errno = 0;
			return why("gs base lost in round %d", round);
		}
	}
	/* A canonical kernel address is allowed by the instruction; the kernel must survive it. */
	asm volatile("wrgsbase %0" ::"r"(kernel));
	yield_raw();
	getppid();
	asm volatile("wrgsbase %0" ::"r"(0ul));
	return NULL;
}

static const char *gs_base_instructions_are_safe(void)
{
	if (!(getauxval(AT_HWCAP2) & 2)) {
		/* Not offered: the instruction must then fault, or be harmless where the backend cannot trap it. */
		catch_all();
		TRY(asm volatile(".byte 0xf3, 0x48, 0x0f, 0xae, 0xd8" ::"a"(0xffffffff81000000ul)));
		yield_raw();
		getppid();
		return NULL;
	}
	return write_gs_base_natively();
}

/* --- several CPUs --- */

static volatile char *shot_page;
static volatile int shot_stop, shot_ready;
static __thread sigjmp_buf shot_resume;
static volatile int shot_faults;

static void shot_fault(int number)
{
	(void)number;
	__atomic_add_fetch(&shot_faults, 1, __ATOMIC_SEQ_CST);
	siglongjmp(shot_resume, 1);
}

static void *shoot_reader(void *argument)
{
	(void)argument;
	__atomic_add_fetch(&shot_ready, 1, __ATOMIC_SEQ_CST);
	while (!shot_stop) {
		if (sigsetjmp(shot_resume, 1))
			continue;
		shot_page[0]++;
	}
	return NULL;
}

/* After mprotect returns, no other CPU may write through a stale translation. */
static const char *other_cpus_see_protection_changes(void)
{
	struct sigaction action = { .sa_handler = shot_fault, .sa_flags = SA_NODEFER };
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	pthread_t threads[16];
	int count = cpus > 16 ? 16 : (int)cpus;

	shot_page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	NEED(shot_page != MAP_FAILED);
	NEED(!sigaction(SIGSEGV, &action, NULL));
	for (int i = 0; i < count; i++)
		NEED(!pthread_create(&threads[i], NULL, shoot_reader, NULL));
	while (shot_ready < count)
		sched_yield();
	for (int round = 0; round < 60; round++) {
		char before, after;

		NEED(!mprotect((void *)shot_page, 4096, PROT_READ));
		before = shot_page[0];
		for (int i = 0; i < 20; i++)
			sched_yield();
		after = shot_page[0];
		errno = 0;
		if (before != after)
			return why("a page was written %d times after it became read-only, round %d", after - before, round);
		NEED(!mprotect((void *)shot_page, 4096, PROT_READ | PROT_WRITE));
	}
	shot_stop = 1;
	for (int i = 0; i < count; i++)
		pthread_join(threads[i], NULL);
	return NULL;
}

static const char *clock_is_monotonic_across_cpus(void)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	double last = 0;

	for (int round = 0; round < 500; round++) {
		cpu_set_t set;
		double time;

		CPU_ZERO(&set);
		CPU_SET(round % cpus, &set);
		NEED(!sched_setaffinity(0, sizeof(set), &set));
		time = now_ns();
		errno = 0;
		if (time < last)
			return why("time went back by %.0f ns", last - time);
		last = time;
	}
	return NULL;
}

static const char *sleep_takes_as_long_as_asked(void)
{
	for (int round = 0; round < 5; round++) {
		struct timespec asked = { 0, 20000000 };
		double begin = now_ns(), took;

		nanosleep(&asked, NULL);
		took = now_ns() - begin;
		errno = 0;
		if (took < 20e6 || took > 30e9)
			return why("20 ms took %.1f ms", took / 1e6);
	}
	return NULL;
}

static const char *fork_copies_on_write(void)
{
	size_t size = 4 << 20;
	unsigned char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int status;

	NEED(memory != MAP_FAILED);
	for (size_t i = 0; i < size; i += 4096)
		memory[i] = i >> 12;
	for (int round = 0; round < 5; round++) {
		pid_t child = fork();

		NEED(child >= 0);
		if (child == 0) {
			for (size_t i = 0; i < size; i += 4096)
				if (memory[i] != (unsigned char)(i >> 12))
					_exit(1);
			memset(memory, 0xff, size);
			_exit(0);
		}
		NEED(waitpid(child, &status, 0) == child);
		errno = 0;
		if (status)
			return why("the child saw other memory");
		for (size_t i = 0; i < size; i += 4096)
			if (memory[i] != (unsigned char)(i >> 12))
				return why("the child's writes reached the parent");
	}
	return NULL;
}

static const struct check checks[] = {
	{ "kernel_half_is_out_of_reach", kernel_half_is_out_of_reach },
	{ "kernel_symbols_are_out_of_reach", kernel_symbols_are_out_of_reach },
	{ "descriptor_tables_are_out_of_reach", descriptor_tables_are_out_of_reach },
	{ "protections_hold", protections_hold },
	{ "privileged_instructions_fault", privileged_instructions_fault },
	{ "kernel_selectors_are_refused", kernel_selectors_are_refused },
	{ "exceptions_become_the_right_signals", exceptions_become_the_right_signals },
	{ "interrupt_flag_cannot_be_cleared", interrupt_flag_cannot_be_cleared },
	{ "sigreturn_cannot_enter_the_kernel", sigreturn_cannot_enter_the_kernel },
	{ "debugger_cannot_set_kernel_selectors", debugger_cannot_set_kernel_selectors },
	{ "single_step_counts_every_instruction", single_step_counts_every_instruction },
	{ "hardware_watchpoint_fires_or_is_refused", hardware_watchpoint_fires_or_is_refused },
	{ "watchpoint_on_kernel_memory_is_refused", watchpoint_on_kernel_memory_is_refused },
	{ "system_call_keeps_registers", system_call_keeps_registers },
	{ "vectors_survive_switches", vectors_survive_switches },
	{ "vectors_survive_signals", vectors_survive_signals },
	{ "floating_point_control_is_per_process", floating_point_control_is_per_process },
	{ "segment_bases_are_per_process", segment_bases_are_per_process },
	{ "gs_base_instructions_are_safe", gs_base_instructions_are_safe },
	{ "other_cpus_see_protection_changes", other_cpus_see_protection_changes },
	{ "clock_is_monotonic_across_cpus", clock_is_monotonic_across_cpus },
	{ "sleep_takes_as_long_as_asked", sleep_takes_as_long_as_asked },
	{ "fork_copies_on_write", fork_copies_on_write },
};

int main(void)
{
	int failed;

	become_init();
	failed = run_checks(checks, COUNT(checks));
	return finish("isolation", COUNT(checks), failed);
}
