/* LD_PRELOAD shim: counts the libc calls that change files below one folder, and ends the process at the n-th.
 *
 * The process is started with this library preloaded and later calls crash_arm(folder, graveyard, at, mode): from then on
 * each call below `folder` is counted and written to the trace. Before call number `at` (from 1) is done, the process is
 *   KILL   killed,
 *   TORN   killed, after half of it was done if it is a write,
 *   POWER  killed, and what was not brought to the disk is gone: files are cut to their length at the last fsync, and names
 *          made, moved or removed since the last fsync of their folder are as they were before,
 *   DATA   killed, and all names survived but data did not: files are cut to their length at the last fsync and zeros
 *          are put over half of what was written after (a file's length is often saved before its content).
 * To put names back, a removed or replaced file is kept as a hard link in `graveyard` (same file system).
 * Calls that change nothing (opening to read, closing) are not counted: dying before them is dying after the last change.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT = 0, KILL = 1, TORN = 2, POWER = 3, DATA = 4 };
enum { MAX_FDS = 4096, MAX_FILES = 8192, MAX_MOVES = 8192 };

typedef struct {
    dev_t dev;
    ino_t ino;
    int handle; /* our own, to cut the file */
    off_t synced, largest;
    int dirty;
} File;

typedef enum { MADE, MADE_FOLDER, LINKED, MOVED, REMOVED } MoveKind;
typedef struct {
    MoveKind kind;
    int durable;
    char from[PATH_MAX], to[PATH_MAX], saved[PATH_MAX]; /* saved: link to what was removed or replaced; "" if nothing */
} Move;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX], graveyard[PATH_MAX];
static int armed, mode, trace = -1;
static long count, crash_at;
static int buried;
static File files[MAX_FILES];
static int n_files;
static Move *moves;
static int n_moves;
static int fd_file[MAX_FDS]; /* index into files + 1 */

/* calls of our own go past the shim */
static int raw_open(const char *path, int flags) { return (int)syscall(SYS_openat, AT_FDCWD, path, flags, 0600); }

static void fail(const char *what) {
    dprintf(2, "crash shim: %s\n", what);
    abort();
}

static int below(const char *path) {
    size_t n = strlen(root);
    return armed && n && strncmp(path, root, n) == 0 && (path[n] == '/' || path[n] == 0);
}

/* absolute path of a name that may not exist yet, relative to a folder handle */
static void full_path(int folder, const char *path, char *out) {
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    char base[PATH_MAX], link[64];
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) fail("getcwd");
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t n = readlink(link, base, sizeof base - 1);
        if (n < 0) {
            out[0] = 0;
            return;
        }
        base[n] = 0;
    }
    if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) fail("path too long");
}

static void handle_path(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    out[n < 0 ? 0 : n] = 0;
}

static void folder_of(const char *path, char *out) {
    snprintf(out, PATH_MAX, "%s", path);
    char *slash = strrchr(out, '/');
    if (slash) *slash = 0;
}

static void undo(Move *m) {
    switch (m->kind) {
    case MADE:
    case LINKED:
        syscall(SYS_unlinkat, AT_FDCWD, m->to, 0);
        break;
    case MADE_FOLDER:
        syscall(SYS_unlinkat, AT_FDCWD, m->to, AT_REMOVEDIR);
        break;
    case MOVED:
        syscall(SYS_renameat2, AT_FDCWD, m->to, AT_FDCWD, m->from, 0);
        if (m->saved[0]) syscall(SYS_linkat, AT_FDCWD, m->saved, AT_FDCWD, m->to, 0);
        break;
    case REMOVED:
        syscall(SYS_linkat, AT_FDCWD, m->saved, AT_FDCWD, m->to, 0);
        break;
    }
}

static void power_cut(void) {
    for (int i = 0; i < n_files; i++) {
        File *f = &files[i];
        if (!f->dirty) continue;
        if (mode == POWER) {
            if (syscall(SYS_ftruncate, f->handle, f->synced)) fail("ftruncate");
        } else {
            char zeros[4096] = {0};
            for (off_t at = f->synced + (f->largest - f->synced) / 2; at < f->largest; at += sizeof zeros) {
                size_t n = (size_t)(f->largest - at) < sizeof zeros ? (size_t)(f->largest - at) : sizeof zeros;
                syscall(SYS_pwrite64, f->handle, zeros, n, at);
            }
        }
    }
    if (mode == POWER)
        for (int i = n_moves - 1; i >= 0; i--)
            if (!moves[i].durable) undo(&moves[i]);
}

static void die(void) {
    if (mode == POWER || mode == DATA) power_cut();
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

/* a counted call is about to be done; called with the lock held. Returns 1 if it is the one to die at (TORN: after half) */
static int tick(const char *name, const char *path) {
    count++;
    if (trace >= 0) {
        char line[PATH_MAX + 64];
        int n = snprintf(line, sizeof line, "%ld %s %s\n", count, name, path + strlen(root));
        syscall(SYS_write, trace, line, n);
    }
    if (mode == COUNT || count != crash_at) return 0;
    if (mode == TORN && strstr(name, "write")) return 1;
    die();
    return 1;
}

static Move *record(MoveKind kind, const char *from, const char *to) {
    if (n_moves == MAX_MOVES) fail("too many changes of names");
    Move *m = &moves[n_moves++];
    m->kind = kind;
    m->durable = 0;
    snprintf(m->from, PATH_MAX, "%s", from);
    snprintf(m->to, PATH_MAX, "%s", to);
    m->saved[0] = 0;
    return m;
}

static void bury(const char *path, char *saved) {
    struct stat found;
    saved[0] = 0;
    if (lstat(path, &found) || S_ISDIR(found.st_mode)) return;
    snprintf(saved, PATH_MAX, "%.3000s/%d", graveyard, buried++);
    if (syscall(SYS_linkat, AT_FDCWD, path, AT_FDCWD, saved, 0)) fail("cannot keep what is removed");
}

static void unrecord(int failed) {
    if (failed) n_moves--;
}

static File *file_of(int fd, int make) {
    if (fd < 0 || fd >= MAX_FDS) return NULL;
    if (fd_file[fd]) return &files[fd_file[fd] - 1];
    if (!make) return NULL;
    struct stat found;
    if (fstat(fd, &found) || !S_ISREG(found.st_mode)) return NULL;
    for (int i = 0; i < n_files; i++)
        if (files[i].dev == found.st_dev && files[i].ino == found.st_ino) {
            fd_file[fd] = i + 1;
            return &files[i];
        }
    if (n_files == MAX_FILES) fail("too many files");
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    File *f = &files[n_files++];
    *f = (File){found.st_dev, found.st_ino, raw_open(link, O_RDWR | O_CLOEXEC), found.st_size, found.st_size, 0};
    if (f->handle < 0) fail("cannot open a second time");
    fd_file[fd] = n_files;
    return f;
}

static void wrote(int fd) {
    struct stat found;
    File *f = file_of(fd, 1);
    if (f && !fstat(fd, &found)) {
        f->dirty = 1;
        if (found.st_size > f->largest) f->largest = found.st_size;
        if (found.st_size < f->synced) f->synced = found.st_size;
    }
}

/* from here on: the calls */

void crash_arm(const char *folder, const char *bury_in, long at, int how, int trace_fd) {
    if (!realpath(folder, root)) fail("no such folder");
    snprintf(graveyard, PATH_MAX, "%s", bury_in);
    moves = malloc(sizeof(Move) * MAX_MOVES);
    crash_at = at, mode = how, trace = trace_fd, count = 0;
    armed = 1;
}

long crash_count(void) { return count; }

static int opened(int folder, const char *path, int flags, mode_t rights) {
    char full[PATH_MAX];
    int writes = (flags & O_ACCMODE) != O_RDONLY;
    if (armed && writes) full_path(folder, path, full);
    if (!armed || !writes || !below(full)) return (int)syscall(SYS_openat, folder, path, flags, rights);
    pthread_mutex_lock(&lock);
    struct stat before;
    int was = !lstat(full, &before);
    int changes = (!was && (flags & O_CREAT)) || (was && (flags & O_TRUNC));
    if (changes) tick("open", full);
    int fd = (int)syscall(SYS_openat, folder, path, flags, rights), error = errno;
    if (fd >= 0 && fd < MAX_FDS) {
        fd_file[fd] = 0;
        if (!was) record(MADE, "", full);
        if (was && (flags & O_TRUNC) && before.st_size) wrote(fd);
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

static mode_t rights_of(int flags, va_list rest) { return (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(rest, mode_t) : 0; }

#define OPEN(name, flags) \
    va_list rest; \
    va_start(rest, flags); \
    mode_t rights = rights_of(flags, rest); \
    va_end(rest);

int open(const char *path, int flags, ...) { OPEN(open, flags) return opened(AT_FDCWD, path, flags, rights); }
int open64(const char *path, int flags, ...) { OPEN(open64, flags) return opened(AT_FDCWD, path, flags | O_LARGEFILE, rights); }
int openat(int folder, const char *path, int flags, ...) { OPEN(openat, flags) return opened(folder, path, flags, rights); }
int openat64(int folder, const char *path, int flags, ...) { OPEN(openat64, flags) return opened(folder, path, flags, rights); }
int creat(const char *path, mode_t rights) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, rights); }
int creat64(const char *path, mode_t rights) { return creat(path, rights); }

int close(int fd) {
    if (armed && fd >= 0 && fd < MAX_FDS) fd_file[fd] = 0;
    return (int)syscall(SYS_close, fd);
}

static int ours(int fd, char *path) {
    if (!armed) return 0;
    handle_path(fd, path);
    return below(path);
}

/* `call` does the write with a length; a torn one does half of `size` */
#define WRITE(name, fd, size, whole, half) \
    char path[PATH_MAX]; \
    if (!ours(fd, path)) return whole; \
    pthread_mutex_lock(&lock); \
    file_of(fd, 1); \
    if (tick(name, path)) { \
        if ((size) > 1) (void)!(half); \
        die(); \
    } \
    ssize_t done = whole; \
    int error = errno; \
    if (done > 0) wrote(fd); \
    pthread_mutex_unlock(&lock); \
    errno = error; \
    return done;

ssize_t write(int fd, const void *data, size_t size) {
    WRITE("write", fd, size, syscall(SYS_write, fd, data, size), syscall(SYS_write, fd, data, size / 2))
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    WRITE("pwrite", fd, size, syscall(SYS_pwrite64, fd, data, size, at), syscall(SYS_pwrite64, fd, data, size / 2, at))
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { return pwrite(fd, data, size, at); }
ssize_t writev(int fd, const struct iovec *parts, int n) {
    WRITE("writev", fd, n, syscall(SYS_writev, fd, parts, n), syscall(SYS_writev, fd, parts, n / 2))
}

static int synced(const char *name, int fd, long call) {
    char path[PATH_MAX];
    if (!ours(fd, path)) return (int)syscall(call, fd);
    pthread_mutex_lock(&lock);
    tick(name, path);
    int result = (int)syscall(call, fd), error = errno;
    struct stat found;
    if (!result && !fstat(fd, &found)) {
        if (S_ISDIR(found.st_mode)) {
            char folder[PATH_MAX];
            for (int i = 0; i < n_moves; i++) {
                folder_of(moves[i].to, folder);
                if (!strcmp(folder, path)) moves[i].durable = 1;
            }
        } else {
            File *f = file_of(fd, 1);
            if (f) f->dirty = 0, f->synced = f->largest = found.st_size;
        }
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}
int fsync(int fd) { return synced("fsync", fd, SYS_fsync); }
int fdatasync(int fd) { return synced("fdatasync", fd, SYS_fdatasync); }

static int cut(int fd, off_t size) {
    char path[PATH_MAX];
    if (!ours(fd, path)) return (int)syscall(SYS_ftruncate, fd, size);
    pthread_mutex_lock(&lock);
    file_of(fd, 1);
    tick("ftruncate", path);
    int result = (int)syscall(SYS_ftruncate, fd, size), error = errno;
    if (!result) wrote(fd);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}
int ftruncate(int fd, off_t size) { return cut(fd, size); }
int ftruncate64(int fd, off64_t size) { return cut(fd, size); }

static int moved(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    char a[PATH_MAX], b[PATH_MAX];
    if (armed) full_path(from_folder, from, a), full_path(to_folder, to, b);
    if (!armed || (!below(a) && !below(b)))
        return (int)syscall(SYS_renameat2, from_folder, from, to_folder, to, flags);
    pthread_mutex_lock(&lock);
    tick("rename", b);
    Move *m = record(MOVED, a, b);
    bury(b, m->saved);
    int result = (int)syscall(SYS_renameat2, from_folder, from, to_folder, to, flags), error = errno;
    unrecord(result);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}
int rename(const char *from, const char *to) { return moved(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    return moved(from_folder, from, to_folder, to, 0);
}
int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    return moved(from_folder, from, to_folder, to, flags);
}

static int linked(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    char full[PATH_MAX];
    if (armed) full_path(to_folder, to, full);
    if (!armed || !below(full)) return (int)syscall(SYS_linkat, from_folder, from, to_folder, to, flags);
    pthread_mutex_lock(&lock);
    tick("link", full);
    record(LINKED, "", full);
    int result = (int)syscall(SYS_linkat, from_folder, from, to_folder, to, flags), error = errno;
    unrecord(result);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}
int link(const char *from, const char *to) { return linked(AT_FDCWD, from, AT_FDCWD, to, 0); }
int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    return linked(from_folder, from, to_folder, to, flags);
}

static int removed(int folder, const char *path, int flags) {
    char full[PATH_MAX];
    if (armed) full_path(folder, path, full);
    if (!armed || !below(full) || (flags & AT_REMOVEDIR)) return (int)syscall(SYS_unlinkat, folder, path, flags);
    pthread_mutex_lock(&lock);
    tick("unlink", full);
    Move *m = record(REMOVED, "", full);
    bury(full, m->saved);
    int result = (int)syscall(SYS_unlinkat, folder, path, flags), error = errno;
    unrecord(result);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}
int unlink(const char *path) { return removed(AT_FDCWD, path, 0); }
int unlinkat(int folder, const char *path, int flags) { return removed(folder, path, flags); }
int remove(const char *path) { return removed(AT_FDCWD, path, 0); }

static int made_folder(int folder, const char *path, mode_t rights) {
    char full[PATH_MAX];
    struct stat found;
    if (armed) full_path(folder, path, full);
    if (!armed || !below(full) || !lstat(full, &found)) return (int)syscall(SYS_mkdirat, folder, path, rights);
    pthread_mutex_lock(&lock);
    tick("mkdir", full);
    record(MADE_FOLDER, "", full);
    int result = (int)syscall(SYS_mkdirat, folder, path, rights), error = errno;
    unrecord(result);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}
int mkdir(const char *path, mode_t rights) { return made_folder(AT_FDCWD, path, rights); }
int mkdirat(int folder, const char *path, mode_t rights) { return made_folder(folder, path, rights); }
