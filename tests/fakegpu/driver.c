/* SPDX-License-Identifier: Apache-2.0
 *
 * libcuda.so.1 and libnvidia-ml.so.1 in one, without a GPU: the ABI that cryoci and the tests' workload call.
 *
 * "VRAM" is memfd_secret memory, which neither CRIU nor process_vm_readv can read, as little as a GPU's. A
 * checkpoint really moves it into anonymous memory of the process, closes what was open, and a restore moves it
 * back. As with the real driver that work is done by a thread inside of the target, so a frozen or stopped target hangs
 * the caller, even one that asks for the state only (seen with 580); a caller reaches it from outside through /proc and needs the right to ptrace it.
 *
 * The target's state is one page of its own memory (struct control), found by the thread's name,
 * "cuda" and the page's number in hex. The node's GPUs are listed in $FAKEGPU_HOME/devices (default /run/fakegpu,
 * then /etc/fakegpu): UUID, bytes, chip. Errors on demand are lines of $FAKEGPU_HOME/faults: OPERATION NTH CODE
 * MODE, where MODE is before, after (it was done all the same), failed (state FAILED), die-before, die-after
 * (the caller is killed) or slow (CODE milliseconds more).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, INVALID = 1, OOM = 2, NOT_INIT = 3, OS_CALL = 304, ILLEGAL = 401, NOT_READY = 600 };
enum { RUNNING, LOCKED, CHECKPOINTED, FAILED };
enum { LOCK = 1, CHECKPOINT, RESTORE, UNLOCK, FAIL };
#define MAGIC 0x757067656b6166ULL
#define DEVICES 8
#define BUFFERS 64
#define KERNELS 64

struct device { unsigned char uuid[16]; char name[64]; uint64_t total; };
struct pair { unsigned char from[16], to[16]; };
struct buffer { uint64_t size; void *at; int fd; int device; };
struct kernel { uint64_t end_us, us; int device; };
struct control {
	uint64_t magic;
	_Atomic int state, calls, poisoned, ready;
	_Atomic unsigned asked, done;
	int request, result, timeout_ms, short_of_memory, missing, pairs;
	struct pair pair[DEVICES];
	char pair_name[DEVICES][64];
	int devices;
	struct device device[DEVICES];
	uint64_t used[DEVICES];
	struct buffer buffer[BUFFERS];
	int nodes[DEVICES];
	int kernels; /* so many were run: the last KERNELS of them are known */
	struct kernel kernel[KERNELS];
};

/* ---- the node ---- */

static const char *home(void)
{
	const char *e = getenv("FAKEGPU_HOME");
	if (e)
		return e;
	return access("/run/fakegpu/devices", R_OK) == 0 ? "/run/fakegpu" : "/etc/fakegpu";
}

static int node_devices(struct device *out)
{
	char path[512], uuid[64], name[64];
	unsigned long long total;
	int n = 0;
	snprintf(path, sizeof path, "%s/devices", home());
	FILE *f = fopen(path, "r");
	if (!f)
		return 0;
	while (n < DEVICES && fscanf(f, "%63s %llu %63[^\n]", uuid, &total, name) == 3) {
		for (int i = 0, at = 0; i < 16; i++) {
			while (uuid[at] == '-' || (at == 0 && !strncmp(uuid, "GPU-", 4)))
				at += at == 0 ? 4 : 1;
			unsigned byte;
			sscanf(uuid + at, "%2x", &byte);
			out[n].uuid[i] = byte;
			at += 2;
		}
		out[n].total = total;
		snprintf(out[n].name, sizeof out[n].name, "%s", name);
		n++;
	}
	fclose(f);
	return n;
}

static void wait_ms(long ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000 };
	while (nanosleep(&t, &t) && errno == EINTR)
		;
}

static int64_t now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

static uint64_t wall_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	return t.tv_sec * 1000000ULL + t.tv_nsec / 1000;
}

/* ---- the target: what a CUDA program calls ---- */

static struct control *me;
static int current;

static void *secret(size_t size, int *fd)
{
	*fd = syscall(SYS_memfd_secret, O_CLOEXEC);
	if (*fd < 0 || ftruncate(*fd, size))
		return NULL;
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
	return at == MAP_FAILED ? NULL : at;
}

static void open_nodes(void)
{
	for (int i = 0; i < me->devices; i++) {
		char path[32];
		snprintf(path, sizeof path, "/dev/nvidia%d", i);
		me->nodes[i] = open(path, O_RDWR | O_CLOEXEC);
	}
}

static int move_out(void)
{
	for (int i = 0; i < BUFFERS; i++) {
		struct buffer *b = &me->buffer[i];
		if (!b->size)
			continue;
		void *to = mmap(NULL, b->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (to == MAP_FAILED)
			return OOM;
		memcpy(to, b->at, b->size);
		munmap(b->at, b->size);
		close(b->fd);
		b->at = to;
		b->fd = -1;
	}
	for (int i = 0; i < me->devices; i++) {
		if (me->nodes[i] >= 0)
			close(me->nodes[i]);
		me->nodes[i] = -1;
	}
	return OK;
}

static int move_in(void)
{
	if (me->pairs) {
		if (me->pairs != me->devices)
			return INVALID;
		int to[DEVICES];
		for (int i = 0; i < me->devices; i++) {
			to[i] = -1;
			for (int p = 0; p < me->pairs; p++)
				if (!memcmp(me->device[i].uuid, me->pair[p].from, 16))
					to[i] = p;
			if (to[i] < 0 || strcmp(me->pair_name[to[i]], me->device[i].name))
				return INVALID;
		}
		for (int i = 0; i < me->devices; i++)
			memcpy(me->device[i].uuid, me->pair[to[i]].to, 16);
	} else if (me->missing) {
		return INVALID;
	}
	if (me->short_of_memory) {
		me->poisoned = 1;
		return OOM;
	}
	for (int i = 0; i < BUFFERS; i++) {
		struct buffer *b = &me->buffer[i];
		if (!b->size)
			continue;
		void *to = secret(b->size, &b->fd);
		if (!to)
			return OOM;
		memcpy(to, b->at, b->size);
		munmap(b->at, b->size);
		b->at = to;
	}
	open_nodes();
	return OK;
}

static int obey(void)
{
	int64_t end = now_ms() + me->timeout_ms;
	switch (me->request) {
	case LOCK:
		if (me->state != RUNNING)
			return ILLEGAL;
		me->state = LOCKED;
		while (me->calls) {
			if (me->timeout_ms && now_ms() > end) {
				me->state = RUNNING;
				return NOT_READY;
			}
			wait_ms(1);
		}
		return OK;
	case CHECKPOINT:
		if (me->state != LOCKED)
			return ILLEGAL;
		if (move_out())
			return OOM;
		me->state = CHECKPOINTED;
		return OK;
	case RESTORE: {
		if (me->state != CHECKPOINTED)
			return ILLEGAL;
		if (me->poisoned)
			return OS_CALL;
		int code = move_in();
		if (code == OK)
			me->state = LOCKED;
		return code;
	}
	case UNLOCK:
		if (me->state != LOCKED)
			return ILLEGAL;
		me->state = RUNNING;
		return OK;
	case FAIL:
		me->state = FAILED;
		return OK;
	}
	return INVALID;
}

static void *restore_thread(void *unused)
{
	char name[32];
	(void)unused;
	snprintf(name, sizeof name, "cuda%09lx", (unsigned long)me >> 12);
	prctl(PR_SET_NAME, name);
	me->ready = 1;
	for (;;) {
		unsigned asked = me->asked;
		if (asked != me->done) {
			me->result = obey();
			me->done = asked;
		}
		wait_ms(1);
	}
	return NULL;
}

int cuInit(unsigned flags)
{
	(void)flags;
	return OK; /* as for the real one, no context is made yet: a caller of the functions below is no target */
}

/* The first use of a device makes the process a CUDA process. */
int cuDevicePrimaryCtxRetain(void **context, int device)
{
	pthread_t thread;
	sigset_t all, before;
	if (!me) {
		struct control *made =
			mmap(NULL, sizeof *made, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (made == MAP_FAILED)
			return OOM;
		made->devices = node_devices(made->device);
		made->magic = MAGIC;
		me = made;
		open_nodes();
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &before);
		pthread_create(&thread, NULL, restore_thread, NULL);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
		while (!me->ready)
			wait_ms(1);
	}
	if (device < 0 || device >= me->devices)
		return 101;
	current = device;
	*context = (void *)(long)(device + 1);
	return OK;
}

static int enter(void)
{
	if (!me)
		return NOT_INIT;
	for (;;) {
		me->calls++;
		if (me->state == RUNNING)
			return OK;
		me->calls--;
		wait_ms(1);
	}
}

static void leave(void) { me->calls--; }

int cuDeviceGetCount(int *count)
{
	struct device found[DEVICES];
	*count = node_devices(found);
	return OK;
}

int cuDeviceGetUuid_v2(unsigned char *uuid, int device)
{
	int code = enter();
	if (code)
		return code;
	memcpy(uuid, me->device[device].uuid, 16);
	leave();
	return OK;
}

int cuMemAlloc_v2(uint64_t *pointer, size_t size)
{
	int code = enter();
	if (code)
		return code;
	code = OOM;
	for (int i = 0; i < BUFFERS && me->used[current] + size <= me->device[current].total; i++) {
		struct buffer *b = &me->buffer[i];
		if (b->size)
			continue;
		b->at = secret(size, &b->fd);
		if (!b->at)
			break;
		b->size = size;
		b->device = current;
		me->used[current] += size;
		*pointer = (uint64_t)(i + 1) << 40; /* not an address that the program could touch itself */
		code = OK;
		break;
	}
	leave();
	return code;
}

int cuMemFree_v2(uint64_t pointer)
{
	uint64_t i = (pointer >> 40) - 1;
	int code = enter();
	if (code)
		return code;
	code = INVALID;
	if (i < BUFFERS && me->buffer[i].size) {
		struct buffer *b = &me->buffer[i];
		munmap(b->at, b->size);
		close(b->fd);
		me->used[b->device] -= b->size;
		memset(b, 0, sizeof *b);
		code = OK;
	}
	leave();
	return code;
}

static char *place(uint64_t pointer, size_t size)
{
	uint64_t i = (pointer >> 40) - 1, offset = pointer & ((1ULL << 40) - 1);
	if (i >= BUFFERS || offset + size > me->buffer[i].size)
		return NULL;
	return (char *)me->buffer[i].at + offset;
}

int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size)
{
	int code = enter();
	if (code)
		return code;
	char *at = place(to, size);
	if (at)
		memcpy(at, from, size);
	leave();
	return at ? OK : INVALID;
}

int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size)
{
	int code = enter();
	if (code)
		return code;
	char *at = place(from, size);
	if (at)
		memcpy(to, at, size);
	leave();
	return at ? OK : INVALID;
}

/* Stands for a kernel that runs for so long. */
int fakeKernel(int ms)
{
	int code = enter();
	if (code)
		return code;
	wait_ms(ms);
	me->kernel[me->kernels++ % KERNELS] = (struct kernel){ wall_us(), ms * 1000ULL, current };
	leave();
	return OK;
}

/* ---- the caller: the checkpoint functions, on another process ---- */

static int faulty(const char *operation, int *code, char *mode)
{
	char path[512], name[32];
	int nth = 0, wanted, found = 0;
	snprintf(path, sizeof path, "%s/faults", home());
	FILE *f = fopen(path, "r");
	if (!f)
		return 0;
	snprintf(path, sizeof path, "%s/count.%s", home(), operation);
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	char text[16] = "";
	if (fd >= 0) {
		flock(fd, LOCK_EX);
		if (pread(fd, text, sizeof text - 1, 0) >= 0)
			nth = atoi(text) + 1;
		int size = snprintf(text, sizeof text, "%d", nth);
		if (pwrite(fd, text, size, 0) < 0)
			nth = 0;
		close(fd);
	}
	while (fscanf(f, "%31s %d %d %31s", name, &wanted, code, mode) == 4)
		if (!strcmp(name, operation) && wanted == nth) {
			found = 1;
			break;
		}
	fclose(f);
	return found;
}

static struct control *find(int pid, struct control *copy, int *code, int *tid)
{
	char path[300], comm[32];
	struct control *at = NULL;
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	DIR *d = opendir(path);
	*code = INVALID;
	if (!d)
		return NULL;
	for (struct dirent *e; !at && (e = readdir(d));) {
		unsigned long page;
		int end = 0;
		snprintf(path, sizeof path, "/proc/%d/task/%s/comm", pid, e->d_name);
		FILE *f = fopen(path, "r");
		if (!f)
			continue;
		if (fgets(comm, sizeof comm, f) && sscanf(comm, "cuda%9lx%n", &page, &end) == 1 && end == 13) {
			struct control *there = (void *)(page << 12);
			struct iovec local = { copy, sizeof *copy }, remote = { there, sizeof *copy };
			ssize_t got = process_vm_readv(pid, &local, 1, &remote, 1, 0);
			if (got == sizeof *copy && copy->magic == MAGIC) {
				at = there;
				*tid = atoi(e->d_name);
				*code = OK;
			} else if (got < 0 && errno == EPERM) {
				*code = OS_CALL;
			}
		}
		fclose(f);
	}
	closedir(d);
	return at;
}

static int put(int pid, void *to, const void *from, size_t size)
{
	struct iovec local = { (void *)from, size }, remote = { to, size };
	return process_vm_writev(pid, &local, 1, &remote, 1, 0) == (ssize_t)size ? OK : INVALID;
}

static uint64_t used_by_others(int pid, const unsigned char *uuid)
{
	uint64_t used = 0;
	DIR *d = opendir("/proc");
	for (struct dirent *e; d && (e = readdir(d));) {
		struct control c;
		int other = atoi(e->d_name), code, tid;
		if (other <= 0 || other == pid || !find(other, &c, &code, &tid) || c.state == CHECKPOINTED)
			continue;
		for (int i = 0; i < c.devices; i++)
			if (!memcmp(c.device[i].uuid, uuid, 16))
				used += c.used[i];
	}
	if (d)
		closedir(d);
	return used;
}

static pthread_mutex_t one_at_a_time[64] = { [0 ... 63] = PTHREAD_MUTEX_INITIALIZER };

static int act(int pid, int request, int timeout_ms, const struct pair *pairs, int count)
{
	struct control c;
	struct device here[DEVICES];
	int code, tid, n = node_devices(here);
	struct control *there;
	for (;;) { /* the call of a caller that was killed goes on to its end */
		there = find(pid, &c, &code, &tid);
		if (!there)
			return code;
		if (c.done == c.asked)
			break;
		wait_ms(1);
	}
	c.request = request;
	c.timeout_ms = timeout_ms;
	c.short_of_memory = c.missing = 0;
	c.pairs = count;
	if (count < 0 || count > DEVICES)
		return INVALID;
	for (int i = 0; request == RESTORE && i < c.devices; i++) {
		const unsigned char *uuid = c.device[i].uuid;
		int known = 0;
		for (int p = 0; p < count; p++)
			if (!memcmp(pairs[p].from, c.device[i].uuid, 16))
				uuid = pairs[p].to;
		for (int k = 0; k < n; k++)
			if (!memcmp(here[k].uuid, uuid, 16)) {
				known = 1;
				if (used_by_others(pid, uuid) + c.used[i] > here[k].total)
					c.short_of_memory = 1;
			}
		c.missing |= !known;
	}
	for (int p = 0; p < count; p++) {
		c.pair[p] = pairs[p];
		c.pair_name[p][0] = 0;
		for (int k = 0; k < n; k++)
			if (!memcmp(here[k].uuid, pairs[p].to, 16))
				memcpy(c.pair_name[p], here[k].name, sizeof here[k].name);
	}
	size_t from = offsetof(struct control, request), to = offsetof(struct control, devices);
	pthread_mutex_lock(&one_at_a_time[pid % 64]);
	code = put(pid, (char *)there + from, (char *)&c + from, to - from);
	unsigned asked = c.asked + 1;
	if (code == OK)
		code = put(pid, (void *)&there->asked, &asked, sizeof asked);
	while (code == OK) {
		if (!find(pid, &c, &code, &tid))
			break; /* it died */
		if (c.done == asked) {
			code = c.result;
			break;
		}
		wait_ms(1);
	}
	pthread_mutex_unlock(&one_at_a_time[pid % 64]);
	return code;
}

static int operate(const char *name, int pid, int request, int timeout_ms, const struct pair *pairs, int count)
{
	int wanted, code;
	char mode[32];
	if (!faulty(name, &wanted, mode))
		return act(pid, request, timeout_ms, pairs, count);
	if (!strcmp(mode, "die-before"))
		kill(getpid(), SIGKILL);
	if (!strcmp(mode, "before"))
		return wanted;
	if (!strcmp(mode, "failed")) {
		act(pid, FAIL, 0, NULL, 0);
		return wanted;
	}
	if (!strcmp(mode, "slow")) {
		wait_ms(wanted);
		return act(pid, request, timeout_ms, pairs, count);
	}
	code = act(pid, request, timeout_ms, pairs, count);
	if (!strcmp(mode, "die-after"))
		kill(getpid(), SIGKILL);
	return code ? code : wanted;
}

struct lock_args { unsigned timeout_ms, reserved0; uint64_t reserved1[7]; };
struct restore_args { const struct pair *pairs; unsigned count; char reserved[44]; uint64_t reserved1; };
_Static_assert(sizeof(struct lock_args) == 64 && sizeof(struct restore_args) == 64, "the ABI");

static int zeroed(const void *from, const void *to)
{
	for (const char *p = from; p < (const char *)to; p++)
		if (*p)
			return 0;
	return 1;
}

int cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
	struct control c;
	int code, wanted;
	char mode[32];
	if (faulty("thread", &wanted, mode))
		return wanted;
	find(pid, &c, &code, tid);
	return code;
}

/* Stopped by a signal, or frozen by its cgroup (v2)? */
static int stands_still(int pid)
{
	char path[400], line[300], state = 0, events[128] = "";
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	FILE *f = fopen(path, "r");
	if (!f)
		return 0;
	if (fgets(line, sizeof line, f) && strrchr(line, ')'))
		state = strrchr(line, ')')[2];
	fclose(f);
	if (state == 'T')
		return 1;
	snprintf(path, sizeof path, "/proc/%d/cgroup", pid);
	f = fopen(path, "r");
	while (f && fgets(line, sizeof line, f)) {
		line[strcspn(line, "\n")] = 0;
		if (strncmp(line, "0::", 3))
			continue;
		snprintf(path, sizeof path, "/sys/fs/cgroup%s/cgroup.events", line + 3);
		FILE *e = fopen(path, "r");
		if (e) {
			events[fread(events, 1, sizeof events - 1, e)] = 0;
			fclose(e);
		}
	}
	if (f)
		fclose(f);
	return strstr(events, "frozen 1") != NULL;
}

int cuCheckpointProcessGetState(int pid, int *state)
{
	struct control c;
	int code, tid, wanted;
	char mode[32];
	if (faulty("state", &wanted, mode))
		return wanted;
	while (stands_still(pid))
		wait_ms(1);
	if (find(pid, &c, &code, &tid))
		*state = c.state;
	return code;
}

int cuCheckpointProcessLock(int pid, struct lock_args *args)
{
	if (args && (args->reserved0 || !zeroed(args->reserved1, args + 1)))
		return INVALID;
	return operate("lock", pid, LOCK, args ? args->timeout_ms : 0, NULL, 0);
}

int cuCheckpointProcessCheckpoint(int pid, void *args)
{
	if (args && !zeroed(args, (char *)args + 64))
		return INVALID;
	return operate("checkpoint", pid, CHECKPOINT, 0, NULL, 0);
}

int cuCheckpointProcessRestore(int pid, struct restore_args *args)
{
	if (args && !zeroed(args->reserved, args + 1))
		return INVALID;
	return operate("restore", pid, RESTORE, 0, args ? args->pairs : NULL, args ? (int)args->count : 0);
}

int cuCheckpointProcessUnlock(int pid, void *args)
{
	if (args && !zeroed(args, (char *)args + 64))
		return INVALID;
	return operate("unlock", pid, UNLOCK, 0, NULL, 0);
}

int cuDriverGetVersion(int *version)
{
	const char *e = getenv("FAKEGPU_CUDA");
	*version = e ? atoi(e) : 13000;
	return OK;
}

int cuGetErrorString(int code, const char **text)
{
	static const struct { int code; const char *text; } known[] = {
		{ OK, "no error" }, { INVALID, "invalid argument" }, { OOM, "out of memory" },
		{ NOT_INIT, "initialization error" },
		{ OS_CALL, "OS call failed or operation not supported on this OS" },
		{ ILLEGAL, "the operation cannot be performed in the present state" },
		{ NOT_READY, "device not ready" }, { 801, "operation not supported" },
	};
	for (size_t i = 0; i < sizeof known / sizeof *known; i++)
		if (known[i].code == code) {
			*text = known[i].text;
			return OK;
		}
	*text = NULL;
	return INVALID;
}

/* ---- NVML ---- */

static struct device nvml_devices[DEVICES];
static int nvml_count;

int nvmlInit_v2(void)
{
	nvml_count = node_devices(nvml_devices);
	return 0;
}
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 3 ? "Not Supported" : "Unknown Error"; }

int nvmlSystemGetDriverVersion(char *text, unsigned size)
{
	const char *e = getenv("FAKEGPU_DRIVER");
	snprintf(text, size, "%s", e ? e : "580.159.04");
	return 0;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
	*count = nvml_count;
	return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
	if ((int)index >= nvml_count)
		return 2;
	*handle = &nvml_devices[index];
	return 0;
}

int nvmlDeviceGetUUID(struct device *d, char *text, unsigned size)
{
	int at = snprintf(text, size, "GPU-");
	for (int i = 0; i < 16; i++)
		at += snprintf(text + at, size - at, "%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", d->uuid[i]);
	return 0;
}

int nvmlDeviceGetName(struct device *d, char *text, unsigned size)
{
	snprintf(text, size, "%s", d->name);
	return 0;
}

int nvmlDeviceGetMinorNumber(struct device *d, unsigned *minor)
{
	*minor = d - nvml_devices;
	return 0;
}

int nvmlDeviceGetMemoryInfo(struct device *d, uint64_t *info)
{
	info[0] = d->total;
	info[2] = used_by_others(0, d->uuid);
	info[1] = info[2] > d->total ? 0 : d->total - info[2];
	return 0;
}

int nvmlDeviceGetCudaComputeCapability(struct device *d, int *major, int *minor)
{
	(void)d;
	*major = 9;
	*minor = 0;
	return 0;
}

int nvmlDeviceGetMigMode(struct device *d, unsigned *now, unsigned *pending)
{
	*now = *pending = strstr(d->name, "MIG") != NULL;
	return 0;
}

int nvmlDeviceGetPersistenceMode(struct device *d, unsigned *mode)
{
	(void)d;
	*mode = 1;
	return 0;
}

struct process { unsigned pid; unsigned long long used; unsigned gpu, compute; };

int nvmlDeviceGetComputeRunningProcesses_v3(struct device *d, unsigned *room, struct process *out)
{
	unsigned n = 0;
	DIR *dir = opendir("/proc");
	for (struct dirent *e; dir && (e = readdir(dir));) {
		struct control c;
		int pid = atoi(e->d_name), code, tid;
		if (pid <= 0 || !find(pid, &c, &code, &tid) || c.state == CHECKPOINTED)
			continue;
		for (int i = 0; i < c.devices; i++)
			if (!memcmp(c.device[i].uuid, d->uuid, 16)) {
				if (n < *room)
					out[n] = (struct process){ pid, c.used[i], 0, 0 };
				n++;
			}
	}
	if (dir)
		closedir(dir);
	int code = n > *room ? 7 : 0;
	*room = n;
	return code;
}

/* Percent of the time since `from` in which a process had a kernel on a device; `last`: when one ended last. */
static unsigned busy(const struct control *c, const unsigned char *uuid, uint64_t from, uint64_t *last)
{
	uint64_t now = wall_us(), us = 0;
	*last = 0;
	for (int k = 0; k < KERNELS && k < c->kernels; k++) {
		const struct kernel *one = &c->kernel[k];
		if (one->end_us <= from || memcmp(c->device[one->device].uuid, uuid, 16))
			continue;
		us += one->us < one->end_us - from ? one->us : one->end_us - from;
		if (one->end_us > *last)
			*last = one->end_us;
	}
	us = us * 100 / (now > from ? now - from : 1);
	return us > 100 ? 100 : us;
}

#define SAMPLE_US 1000000ULL /* the driver's own buffer holds a few seconds; its rates are over the last one */
struct sample { unsigned pid; unsigned long long at; unsigned sm, memory, encoder, decoder; };
struct rates { unsigned gpu, memory; };

/* One sample for each process that had kernels since `seen`; 6 (not found) when none had, as the driver says. */
int nvmlDeviceGetProcessUtilization(struct device *d, struct sample *out, unsigned *room, unsigned long long seen)
{
	unsigned n = 0, had = out ? *room : 0;
	uint64_t now = wall_us(), last;
	const char *e = getenv("FAKEGPU_NO_PROCESS_UTILIZATION");
	if (e)
		return 3;
	if (seen + 10 * SAMPLE_US < now)
		seen = now - 10 * SAMPLE_US;
	DIR *dir = opendir("/proc");
	for (struct dirent *entry; dir && (entry = readdir(dir));) {
		struct control c;
		int pid = atoi(entry->d_name), code, tid;
		if (pid <= 0 || !find(pid, &c, &code, &tid))
			continue;
		unsigned sm = busy(&c, d->uuid, seen, &last);
		if (!last)
			continue;
		if (n < had)
			out[n] = (struct sample){ pid, last, sm, 0, 0, 0 };
		n++;
	}
	if (dir)
		closedir(dir);
	*room = n;
	return n == 0 ? 6 : n > had ? 7 : 0;
}

int nvmlDeviceGetUtilizationRates(struct device *d, struct rates *out)
{
	uint64_t from = wall_us() - SAMPLE_US, last;
	DIR *dir = opendir("/proc");
	*out = (struct rates){ 0, 0 };
	for (struct dirent *entry; dir && (entry = readdir(dir));) {
		struct control c;
		int pid = atoi(entry->d_name), code, tid;
		if (pid > 0 && find(pid, &c, &code, &tid))
			out->gpu += busy(&c, d->uuid, from, &last);
	}
	if (dir)
		closedir(dir);
	out->gpu = out->gpu > 100 ? 100 : out->gpu;
	return 0;
}

int nvmlDeviceGetMPSComputeRunningProcesses_v3(struct device *d, unsigned *room, struct process *out)
{
	(void)d;
	(void)out;
	*room = 0;
	return 0;
}

/* ---- what r615 has besides, for its callers to find; $FAKEGPU_CUDA says the version ---- */

static int complete(void *handle)
{
	(void)handle;
	return 801;
}

int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status)
{
	int have;
	(void)flags;
	(void)status;
	cuDriverGetVersion(&have);
	*found = have >= 13040 && version >= 13040 && !strcmp(name, "cuCheckpointOperationComplete") ? complete : NULL;
	return *found ? OK : 500; /* CUDA_ERROR_NOT_FOUND */
}
