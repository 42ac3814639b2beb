/* Processes and how they talk: IPC, signals, tracing, asynchronous I/O, scheduling. */
#include "features.h"
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <linux/kcmp.h>
#include <linux/perf_event.h>
#include <linux/sched.h>
#include <mqueue.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/user.h>

static const char *message_queue_delivers(void)
{
	struct mq_attr attributes = { .mq_maxmsg = 4, .mq_msgsize = 16 };
	mqd_t queue = mq_open("/hull", O_RDWR | O_CREAT, 0600, &attributes);
	char text[16];

	NEED(queue != (mqd_t)-1);
	NEED(!mq_send(queue, "hull", 4, 1));
	NEED(mq_receive(queue, text, sizeof(text), NULL) == 4);
	return NULL;
}

static const char *system_v_ipc(void)
{
	int memory = shmget(IPC_PRIVATE, 4096, 0600 | IPC_CREAT), semaphore = semget(IPC_PRIVATE, 1, 0600 | IPC_CREAT);
	int queue = msgget(IPC_PRIVATE, 0600 | IPC_CREAT);
	struct { long type; char text[4]; } message = { 1, "abc" };
	struct sembuf up = { 0, 1, 0 };

	NEED(memory >= 0 && semaphore >= 0 && queue >= 0);
	NEED(shmat(memory, NULL, 0) != (void *)-1);
	NEED(!semop(semaphore, &up, 1));
	NEED(!msgsnd(queue, &message, 4, 0));
	NEED(msgrcv(queue, &message, 4, 0, 0) == 4);
	return NULL;
}

static const char *io_uring_completes(void)
{
	struct io_uring_params parameters = { 0 };
	int ring = syscall(SYS_io_uring_setup, 4, &parameters);
	char *submission, *entries;
	struct io_uring_cqe *completions;
	unsigned *tail, *array, *completed;

	NEED(ring >= 0);
	submission = mmap(NULL, parameters.sq_off.array + parameters.sq_entries * 4 + 4096, PROT_READ | PROT_WRITE, MAP_SHARED, ring,
			  IORING_OFF_SQ_RING);
	NEED(submission != MAP_FAILED);
	entries = mmap(NULL, parameters.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE, MAP_SHARED, ring,
		       IORING_OFF_SQES);
	NEED(entries != MAP_FAILED);
	memset(entries, 0, sizeof(struct io_uring_sqe));
	((struct io_uring_sqe *)entries)->opcode = IORING_OP_NOP;
	((struct io_uring_sqe *)entries)->user_data = 42;
	tail = (unsigned *)(submission + parameters.sq_off.tail);
	array = (unsigned *)(submission + parameters.sq_off.array);
	array[0] = 0;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	NEED(syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1);
	completed = (unsigned *)(submission + parameters.cq_off.tail);
	completions = (struct io_uring_cqe *)(submission + parameters.cq_off.cqes);
	errno = 0;
	NEED(*completed == 1 && completions[0].user_data == 42 && completions[0].res == 0);
	return NULL;
}

static const char *aio_reads(void)
{
	char path[64], buffer[8];
	int file = temporary_file(path, "content");
	aio_context_t context = 0;
	struct iocb request = { .aio_lio_opcode = IOCB_CMD_PREAD, .aio_nbytes = 7 }, *list[] = { &request };
	struct io_event event;

	NEED(file >= 0);
	request.aio_fildes = file;
	request.aio_buf = (uintptr_t)buffer;
	NEED(!syscall(SYS_io_setup, 4, &context));
	NEED(syscall(SYS_io_submit, context, 1, list) == 1);
	NEED(syscall(SYS_io_getevents, context, 1, 1, &event, NULL) == 1);
	errno = 0;
	NEED(event.res == 7);
	return NULL;
}

static const char *event_descriptors(void)
{
	int poll_ = epoll_create1(0), timer = timerfd_create(CLOCK_MONOTONIC, 0), event = eventfd(0, 0), signals;
	struct itimerspec soon = { .it_value = { 0, 1000000 } };
	struct epoll_event wanted = { .events = EPOLLIN }, seen;
	sigset_t set;

	NEED(poll_ >= 0 && timer >= 0 && event >= 0);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signals = signalfd(-1, &set, 0);
	NEED(signals >= 0);
	NEED(!epoll_ctl(poll_, EPOLL_CTL_ADD, timer, &wanted));
	NEED(!timerfd_settime(timer, 0, &soon, NULL));
	NEED(epoll_wait(poll_, &seen, 1, 30000) == 1);
	raise(SIGUSR1);
	NEED(read(signals, &(struct signalfd_siginfo){ 0 }, sizeof(struct signalfd_siginfo)) > 0);
	return NULL;
}

static const char *process_descriptors(void)
{
	struct clone_args arguments = { .exit_signal = SIGCHLD, .flags = CLONE_PIDFD };
	int descriptor = -1;
	pid_t child;
	siginfo_t info;

	arguments.pidfd = (uintptr_t)&descriptor;
	child = syscall(SYS_clone3, &arguments, sizeof(arguments));
	NEED(child >= 0);
	if (child == 0) {
		pause();
		_exit(0);
	}
	NEED(descriptor >= 0);
	NEED(!syscall(SYS_pidfd_send_signal, descriptor, SIGTERM, NULL, 0));
	NEED(!waitid(3 /* P_PIDFD */, descriptor, &info, WEXITED));
	errno = 0;
	NEED(info.si_status == SIGTERM);
	return NULL;
}

static const char *tracer_reads_and_writes(void)
{
	static volatile long variable = 1;
	long value = 0;
	struct iovec local = { &value, sizeof(value) }, remote = { (void *)&variable, sizeof(value) };
	int status;
	pid_t child = fork();

	if (child == 0) {
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		variable = 5;
		raise(SIGSTOP);
		_exit(variable);
	}
	NEED(waitpid(child, &status, 0) == child && WIFSTOPPED(status));
	NEED(ptrace(PTRACE_PEEKDATA, child, &variable, NULL) == 5);
	NEED(process_vm_readv(child, &local, 1, &remote, 1, 0) == sizeof(value) && value == 5);
	NEED(!ptrace(PTRACE_POKEDATA, child, &variable, 9));
	NEED(syscall(SYS_kcmp, getpid(), child, KCMP_FILE, 1, 1) == 0);
	NEED(!ptrace(PTRACE_CONT, child, NULL, NULL));
	NEED(waitpid(child, &status, 0) == child);
	errno = 0;
	NEED(WIFEXITED(status) && WEXITSTATUS(status) == 9);
	return NULL;
}

static const char *core_is_dumped(void)
{
	struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	struct stat core;
	int status;
	pid_t child;

	NEED(!write_file("/proc/sys/kernel/core_pattern", "/tmp/core"));
	child = fork();
	if (child == 0) {
		setrlimit(RLIMIT_CORE, &unlimited);
		abort();
	}
	NEED(waitpid(child, &status, 0) == child);
	errno = 0;
	NEED(WIFSIGNALED(status) && WCOREDUMP(status));
	NEED(!stat("/tmp/core", &core) || !stat("/tmp/core.1", &core));
	NEED(core.st_size > 4096);
	return NULL;
}

/* Files that begin with HULLBIN are run by /bin/features-helper, which is this program under another name: exit 42. */
static const char *binary_formats_register(void)
{
	const char *folder = temporary_folder();
	char path[128], program[64];
	int file, status;
	pid_t child;

	NEED(!mount("binfmt_misc", folder, "binfmt_misc", 0, NULL));
	snprintf(path, sizeof(path), "%s/register", folder);
	NEED(!write_file(path, ":hull:M::HULLBIN::/bin/features-helper:"));
	file = temporary_file(program, "HULLBIN");
	NEED(file >= 0);
	NEED(!fchmod(file, 0755));
	close(file);
	child = fork();
	if (child == 0) {
		execl(program, program, NULL);
		_exit(1);
	}
	NEED(waitpid(child, &status, 0) == child);
	errno = 0;
	NEED(WIFEXITED(status) && WEXITSTATUS(status) == 42);
	NEED(!umount(folder));
	return NULL;
}

static const char *keyrings_hold_keys(void)
{
	long key = syscall(SYS_add_key, "user", "hull", "secret", 6, -2 /* process keyring */);
	char content[8];

	NEED(key >= 0);
	NEED(syscall(SYS_keyctl, 11 /* read */, key, content, sizeof(content)) == 6);
	return NULL;
}

/* Page faults, because an emulator's clocks may stand still while it is not running. */
static const char *performance_events_count(void)
{
	struct perf_event_attr attributes = { .type = PERF_TYPE_SOFTWARE, .size = sizeof(attributes),
					      .config = PERF_COUNT_SW_PAGE_FAULTS };
	int counter = syscall(SYS_perf_event_open, &attributes, 0, -1, -1, 0);
	char *memory = mmap(NULL, 64 << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t value = 0;

	NEED(counter >= 0);
	NEED(memory != MAP_FAILED);
	for (int i = 0; i < 64; i++)
		memory[i << 12] = 1;
	NEED(read(counter, &value, sizeof(value)) == sizeof(value));
	errno = 0;
	return value > 0 ? NULL : why("no page fault was counted");
}

static const char *scheduling_policies(void)
{
	struct sched_param parameters = { .sched_priority = 5 };
	struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t runtime, deadline, period; } deadline = {
		48, 6, 0, 0, 0, 1000000, 10000000, 10000000 };

	NEED(!sched_setscheduler(0, SCHED_FIFO, &parameters));
	NEED(!syscall(SYS_sched_setattr, 0, &deadline, 0));
	parameters.sched_priority = 0;
	NEED(!sched_setscheduler(0, SCHED_BATCH, &parameters));
	NEED(!sched_setscheduler(0, SCHED_IDLE, &parameters));
	NEED(!setpriority(PRIO_PROCESS, 0, 5));
	NEED(!syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 4));
	return NULL;
}

static void *idle_thread(void *argument)
{
	return argument;
}

static const char *restartable_sequences_and_robust_threads(void)
{
	pthread_mutexattr_t attributes;
	pthread_mutex_t mutex;
	pthread_t thread;

	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT);
	pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
	errno = pthread_mutex_init(&mutex, &attributes);
	NEED(errno == 0);
	errno = pthread_mutex_lock(&mutex);
	NEED(errno == 0);
	NEED(!pthread_mutex_unlock(&mutex));
	errno = pthread_create(&thread, NULL, idle_thread, NULL);
	NEED(errno == 0);
	pthread_join(thread, NULL);
	/* EINVAL or EBUSY: the C library has registered this thread already. */
	NEED(syscall(SYS_rseq, NULL, 0, 0, 0) == -1 && errno != ENOSYS);
	return NULL;
}

static volatile long ticks;

static void tick(int number)
{
	(void)number;
	ticks++;
}

static const char *posix_timers_tick(void)
{
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN };
	struct itimerspec often = { { 0, 2000000 }, { 0, 2000000 } };
	struct timespec rest = { 0, 100000000 };
	timer_t timer;
	double end = now_ns() + 30e9;

	signal(SIGRTMIN, tick);
	NEED(!timer_create(CLOCK_MONOTONIC, &event, &timer));
	NEED(!timer_settime(timer, 0, &often, NULL));
	while (ticks < 20 && now_ns() < end)
		nanosleep(&rest, NULL);
	errno = 0;
	return ticks >= 20 ? NULL : why("%ld ticks of 20", ticks);
}

static const char *pseudo_terminals(void)
{
	int master, slave;
	char text[8];

	mkdir("/dev/pts", 0755);
	mount("devpts", "/dev/pts", "devpts", 0, NULL);
	master = posix_openpt(O_RDWR | O_NOCTTY);
	NEED(master >= 0);
	NEED(!unlockpt(master));
	slave = open(ptsname(master), O_RDWR | O_NOCTTY);
	NEED(slave >= 0);
	NEED(write(master, "hi\n", 3) == 3);
	NEED(read(slave, text, sizeof(text)) == 3);
	return NULL;
}

static const char *randomness_is_ready(void)
{
	unsigned char one[16] = { 0 }, other[16] = { 0 };

	NEED(syscall(SYS_getrandom, one, 16, 1 /* do not wait */) == 16);
	NEED(syscall(SYS_getrandom, other, 16, 1) == 16);
	errno = 0;
	NEED(memcmp(one, other, 16));
	return NULL;
}

/* Takes a CPU away while it is busy, brings it back and runs on it. */
static const char *cpus_go_and_come_back(void)
{
	int cpus = sysconf(_SC_NPROCESSORS_CONF);
	pid_t busy[16];
	char path[64];

	for (int cpu = 0; cpu < cpus && cpu < COUNT(busy); cpu++) {
		busy[cpu] = fork();
		if (!busy[cpu]) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			for (;;)
				getppid();
		}
	}
	for (int round = 0; round < 3; round++) {
		for (int cpu = 1; cpu < cpus; cpu++) {
			cpu_set_t only;

			snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d/online", cpu);
			NEED(!write_file(path, "0"));
			NEED(sysconf(_SC_NPROCESSORS_ONLN) == cpus - 1);
			NEED(!write_file(path, "1"));
			NEED(sysconf(_SC_NPROCESSORS_ONLN) == cpus);
			CPU_ZERO(&only);
			CPU_SET(cpu, &only);
			NEED(!sched_setaffinity(0, sizeof(only), &only));
			NEED(sched_getcpu() == cpu);
			CPU_ZERO(&only);
			CPU_SET(0, &only);
			NEED(!sched_setaffinity(0, sizeof(only), &only));
		}
	}
	for (int cpu = 0; cpu < cpus && cpu < COUNT(busy); cpu++)
		kill(busy[cpu], SIGKILL);
	return NULL;
}

const struct check process_checks[] = {
	{ "message_queue_delivers", message_queue_delivers },
	{ "system_v_ipc", system_v_ipc },
	{ "io_uring_completes", io_uring_completes },
	{ "aio_reads", aio_reads },
	{ "event_descriptors", event_descriptors },
	{ "process_descriptors", process_descriptors },
	{ "tracer_reads_and_writes", tracer_reads_and_writes },
	{ "core_is_dumped", core_is_dumped },
	{ "binary_formats_register", binary_formats_register },
	{ "keyrings_hold_keys", keyrings_hold_keys },
	{ "performance_events_count", performance_events_count },
	{ "scheduling_policies", scheduling_policies },
	{ "restartable_sequences_and_robust_threads", restartable_sequences_and_robust_threads },
	{ "posix_timers_tick", posix_timers_tick },
	{ "cpus_go_and_come_back", cpus_go_and_come_back },
	{ "pseudo_terminals", pseudo_terminals },
	{ "randomness_is_ready", randomness_is_ready },
};
const int process_count = COUNT(process_checks);
