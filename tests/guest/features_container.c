/* What containers are made of: cgroups, namespaces, seccomp, BPF, Landlock. */
#include "features.h"
#include <linux/audit.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#define CGROUP "/sys/fs/cgroup"

static const char *cgroup_controllers_are_all_there(void)
{
	static const char *const names[] = { "cpuset", "cpu", "io", "memory", "hugetlb", "pids", "misc" };
	char list[512];
	const char *text = read_file(CGROUP "/cgroup.controllers");

	NEED(text);
	snprintf(list, sizeof(list), " %s ", text);
	for (char *c = list; *c; c++)
		if (*c == '\n')
			*c = ' ';
	for (int i = 0; i < COUNT(names); i++) {
		char word[32], enable[32];

		snprintf(word, sizeof(word), " %s ", names[i]);
		errno = 0;
		if (!strstr(list, word))
			return why("no %s controller", names[i]);
		snprintf(enable, sizeof(enable), "+%s", names[i]);
		if (write_file(CGROUP "/cgroup.subtree_control", enable))
			return why("enabling %s:", names[i]);
	}
	return NULL;
}

/* A child in a new cgroup NAME with FILE set to VALUE before it runs BODY; its wait status, or -1. */
static int in_cgroup(const char *name, const char *file, const char *value, int (*body)(void))
{
	char path[128], setting[160];
	int status, ready[2];
	pid_t child;

	snprintf(path, sizeof(path), CGROUP "/%s", name);
	if ((mkdir(path, 0755) && errno != EEXIST) || pipe(ready))
		return -1;
	snprintf(setting, sizeof(setting), "%s/%s", path, file);
	if (write_file(setting, value))
		return -1;
	child = fork();
	if (child == 0) {
		char procs[160];

		snprintf(procs, sizeof(procs), "%s/cgroup.procs", path);
		_exit(write_file(procs, "0") ? 99 : body());
	}
	if (waitpid(child, &status, 0) != child)
		return -1;
	return status;
}

static int use_much_memory(void)
{
	size_t size = 64 << 20;
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	for (size_t at = 0; at < size; at += 4096)
		memory[at] = 1;
	return 0;
}

static const char *memory_limit_kills(void)
{
	int status = in_cgroup("memory", "memory.max", "16M", use_much_memory);
	const char *events;

	NEED(status != -1);
	errno = 0;
	NEED(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	events = read_file(CGROUP "/memory/memory.events");
	NEED(events && strstr(events, "oom_kill 1"));
	NEED(read_file(CGROUP "/memory/memory.pressure"));
	return NULL;
}

static int fork_many(void)
{
	for (int i = 0; i < 20; i++) {
		pid_t child = fork();

		if (child < 0)
			return errno == EAGAIN ? 7 : 1;
		if (child == 0) {
			sleep(1);
			_exit(0);
		}
	}
	return 0;
}

static const char *pids_limit_refuses(void)
{
	int status = in_cgroup("pids", "pids.max", "5", fork_many);

	NEED(status != -1);
	errno = 0;
	NEED(WIFEXITED(status) && WEXITSTATUS(status) == 7);
	return NULL;
}

static int spin_two_seconds(void)
{
	double end = now_ns() + 2e9;
	struct timespec used;

	while (now_ns() < end)
		;
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
	/* A tenth of a CPU, with room for the slices' granularity, and for a busy host that takes the CPU away: the
	 * guest counts that as used, and sits out what it is in debt.
	 */
	return used.tv_sec == 0 ? 0 : 1;
}

static const char *cpu_quota_throttles(void)
{
	int status = in_cgroup("cpu", "cpu.max", "2000 20000", spin_two_seconds);

	NEED(status != -1);
	errno = 0;
	NEED(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	return NULL;
}

static int count_cpus(void)
{
	cpu_set_t set;

	sched_getaffinity(0, sizeof(set), &set);
	return CPU_COUNT(&set) == 1 ? 0 : 1;
}

static const char *cpuset_confines(void)
{
	int status = in_cgroup("cpuset", "cpuset.cpus", "0", count_cpus);

	NEED(status != -1);
	errno = 0;
	NEED(WIFEXITED(status) && WEXITSTATUS(status) == 0);
	return NULL;
}

static const char *cgroup_freezes_and_kills(void)
{
	pid_t child;
	int status;
	char text[32];

	NEED(!mkdir(CGROUP "/freeze", 0755));
	child = fork();
	if (child == 0)
		for (;;)
			pause();
	snprintf(text, sizeof(text), "%d", child);
	NEED(!write_file(CGROUP "/freeze/cgroup.procs", text));
	NEED(!write_file(CGROUP "/freeze/cgroup.freeze", "1"));
	for (int i = 0; i < 3000; i++) {
		const char *events = read_file(CGROUP "/freeze/cgroup.events");

		if (events && strstr(events, "frozen 1"))
			break;
		usleep(10000);
		NEED(i < 2999);
	}
	NEED(!write_file(CGROUP "/freeze/cgroup.kill", "1"));
	NEED(waitpid(child, &status, 0) == child && WIFSIGNALED(status));
	return NULL;
}

static const char *io_controller_has_its_files(void)
{
	NEED(!mkdir(CGROUP "/io", 0755));
	NEED(!access(CGROUP "/io/io.max", R_OK));
	NEED(!access(CGROUP "/io/io.stat", R_OK));
	NEED(!access(CGROUP "/io/io.pressure", R_OK));
	NEED(!access(CGROUP "/io.cost.qos", R_OK));
	return NULL;
}

static const char *every_namespace_unshares(void)
{
	static const struct { int flag; const char *name; } spaces[] = {
		{ CLONE_NEWNS, "mnt" }, { CLONE_NEWUTS, "uts" }, { CLONE_NEWIPC, "ipc" }, { CLONE_NEWNET, "net" },
		{ CLONE_NEWCGROUP, "cgroup" }, { CLONE_NEWPID, "pid_for_children" }, { 0x80 /* time */, "time_for_children" },
		{ CLONE_NEWUSER, "user" },
	};

	for (int i = 0; i < COUNT(spaces); i++) {
		char path[64], before[64] = "", after[64] = "";

		snprintf(path, sizeof(path), "/proc/self/ns/%s", spaces[i].name);
		NEED(readlink(path, before, sizeof(before) - 1) > 0);
		if (unshare(spaces[i].flag))
			return why("unshare of %s:", spaces[i].name);
		/* A pid namespace has no name until its first process exists. */
		if (spaces[i].flag == CLONE_NEWPID)
			continue;
		NEED(readlink(path, after, sizeof(after) - 1) > 0);
		errno = 0;
		if (!strcmp(before, after))
			return why("still in the same %s namespace", spaces[i].name);
	}
	return NULL;
}

static const char *pid_namespace_has_its_own_init(void)
{
	int status;
	pid_t child;

	NEED(!unshare(CLONE_NEWPID | CLONE_NEWNS));
	child = fork();
	if (child == 0)
		_exit(getpid() == 1 ? 0 : 1);
	NEED(waitpid(child, &status, 0) == child);
	errno = 0;
	NEED(status == 0);
	return NULL;
}

static const char *time_namespace_shifts_the_clock(void)
{
	struct timespec now;
	int status;
	pid_t child;

	NEED(!unshare(0x80));
	NEED(!write_file("/proc/self/timens_offsets", "monotonic 100000 0"));
	child = fork();
	if (child == 0) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		_exit(now.tv_sec >= 100000 ? 0 : 1);
	}
	NEED(waitpid(child, &status, 0) == child);
	errno = 0;
	NEED(status == 0);
	return NULL;
}

static const char *user_namespace_as_an_ordinary_user(void)
{
	NEED(!setgid(1000));
	NEED(!setuid(1000));
	NEED(!prctl(PR_SET_DUMPABLE, 1));
	NEED(!unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET));
	NEED(!write_file("/proc/self/uid_map", "0 1000 1"));
	errno = 0;
	NEED(getuid() == 0);
	NEED(!mount("tmpfs", "/tmp", "tmpfs", 0, NULL));
	return NULL;
}

static int install_filter(unsigned number, unsigned action, unsigned flags)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, action),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { COUNT(code), code };

	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

static const char *seccomp_filter_refuses(void)
{
	NEED(!install_filter(SYS_getppid, SECCOMP_RET_ERRNO | 77, 0));
	NEED(syscall(SYS_getppid) == -1 && errno == 77);
	return NULL;
}

static const char *seccomp_filter_kills(void)
{
	int status;
	pid_t child = fork();

	if (child == 0) {
		install_filter(SYS_getppid, SECCOMP_RET_KILL_PROCESS, 0);
		syscall(SYS_getppid);
		_exit(0);
	}
	NEED(waitpid(child, &status, 0) == child);
	errno = 0;
	NEED(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS);
	return NULL;
}

static const char *seccomp_asks_a_supervisor(void)
{
	int listener = install_filter(SYS_getppid, SECCOMP_RET_USER_NOTIF, SECCOMP_FILTER_FLAG_NEW_LISTENER);
	struct seccomp_notif request = { 0 };
	struct seccomp_notif_resp answer = { 0 };
	int status;
	pid_t child;

	NEED(listener >= 0);
	child = fork();
	if (child == 0)
		_exit(syscall(SYS_getppid) == 4242 ? 0 : 1);
	NEED(!ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &request));
	answer.id = request.id;
	answer.val = 4242;
	NEED(!ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer));
	NEED(waitpid(child, &status, 0) == child);
	errno = 0;
	NEED(status == 0);
	return NULL;
}

static int bpf(int command, union bpf_attr *attributes)
{
	return syscall(SYS_bpf, command, attributes, sizeof(*attributes));
}

static int load_program(unsigned type, unsigned attach, const struct bpf_insn *code, int count)
{
	union bpf_attr attributes;

	memset(&attributes, 0, sizeof(attributes));
	attributes.prog_type = type;
	attributes.expected_attach_type = attach;
	attributes.insns = (uintptr_t)code;
	attributes.insn_cnt = count;
	attributes.license = (uintptr_t) "GPL";
	return bpf(BPF_PROG_LOAD, &attributes);
}

static const char *bpf_map_and_program(void)
{
	/* r0 = 42; exit */
	static const struct bpf_insn code[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 42 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr attributes;
	static char packet[64];
	uint64_t key = 1, value = 2, found = 0;
	int map, program;
	struct bpf_prog_info info = { 0 };

	memset(&attributes, 0, sizeof(attributes));
	attributes.map_type = BPF_MAP_TYPE_HASH;
	attributes.key_size = attributes.value_size = 8;
	attributes.max_entries = 16;
	map = bpf(BPF_MAP_CREATE, &attributes);
	NEED(map >= 0);
	memset(&attributes, 0, sizeof(attributes));
	attributes.map_fd = map;
	attributes.key = (uintptr_t)&key;
	attributes.value = (uintptr_t)&value;
	NEED(!bpf(BPF_MAP_UPDATE_ELEM, &attributes));
	attributes.value = (uintptr_t)&found;
	NEED(!bpf(BPF_MAP_LOOKUP_ELEM, &attributes));
	errno = 0;
	NEED(found == 2);

	program = load_program(BPF_PROG_TYPE_SOCKET_FILTER, 0, code, COUNT(code));
	NEED(program >= 0);
	memset(&attributes, 0, sizeof(attributes));
	attributes.test.prog_fd = program;
	attributes.test.data_in = (uintptr_t)packet;
	attributes.test.data_size_in = sizeof(packet);
	NEED(!bpf(BPF_PROG_TEST_RUN, &attributes));
	errno = 0;
	NEED(attributes.test.retval == 42);
	memset(&attributes, 0, sizeof(attributes));
	attributes.info.bpf_fd = program;
	attributes.info.info_len = sizeof(info);
	attributes.info.info = (uintptr_t)&info;
	NEED(!bpf(BPF_OBJ_GET_INFO_BY_FD, &attributes));
	errno = 0;
	/* Compiled to machine code, not interpreted. */
	NEED(info.jited_prog_len > 0);
	return NULL;
}

static const char *bpf_guards_devices(void)
{
	static const struct bpf_insn code[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr attributes;
	int program, group;

	NEED(!mkdir(CGROUP "/device", 0755));
	program = load_program(BPF_PROG_TYPE_CGROUP_DEVICE, 0, code, COUNT(code));
	NEED(program >= 0);
	group = open(CGROUP "/device", O_RDONLY | O_DIRECTORY);
	NEED(group >= 0);
	memset(&attributes, 0, sizeof(attributes));
	attributes.target_fd = group;
	attributes.attach_bpf_fd = program;
	attributes.attach_type = BPF_CGROUP_DEVICE;
	NEED(!bpf(BPF_PROG_ATTACH, &attributes));
	NEED(!write_file(CGROUP "/device/cgroup.procs", "0"));
	NEED(open("/dev/null", O_RDONLY) == -1 && errno == EPERM);
	return NULL;
}

static const char *landlock_confines(void)
{
	struct landlock_ruleset_attr rules = { .handled_access_fs = LANDLOCK_ACCESS_FS_READ_FILE };
	int version = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION), set;

	NEED(version >= 4);
	set = syscall(SYS_landlock_create_ruleset, &rules, sizeof(rules), 0);
	NEED(set >= 0);
	NEED(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	NEED(!syscall(SYS_landlock_restrict_self, set, 0));
	NEED(open("/proc/version", O_RDONLY) == -1 && errno == EACCES);
	return NULL;
}

static const char *pressure_and_accounting(void)
{
	const char *text = read_file("/proc/pressure/memory");

	NEED(text && strstr(text, "some avg10="));
	text = read_file("/proc/self/io");
	NEED(text && strstr(text, "read_bytes"));
	NEED(!access("/proc/config.gz", R_OK));
	return NULL;
}

const struct check container_checks[] = {
	{ "cgroup_controllers_are_all_there", cgroup_controllers_are_all_there },
	{ "memory_limit_kills", memory_limit_kills },
	{ "pids_limit_refuses", pids_limit_refuses },
	{ "cpu_quota_throttles", cpu_quota_throttles },
	{ "cpuset_confines", cpuset_confines },
	{ "cgroup_freezes_and_kills", cgroup_freezes_and_kills },
	{ "io_controller_has_its_files", io_controller_has_its_files },
	{ "every_namespace_unshares", every_namespace_unshares },
	{ "pid_namespace_has_its_own_init", pid_namespace_has_its_own_init },
	{ "time_namespace_shifts_the_clock", time_namespace_shifts_the_clock },
	{ "user_namespace_as_an_ordinary_user", user_namespace_as_an_ordinary_user },
	{ "seccomp_filter_refuses", seccomp_filter_refuses },
	{ "seccomp_filter_kills", seccomp_filter_kills },
	{ "seccomp_asks_a_supervisor", seccomp_asks_a_supervisor },
	{ "bpf_map_and_program", bpf_map_and_program },
	{ "bpf_guards_devices", bpf_guards_devices },
	{ "landlock_confines", landlock_confines },
	{ "pressure_and_accounting", pressure_and_accounting },
};
const int container_count = COUNT(container_checks);
