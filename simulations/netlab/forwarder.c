/* One impaired link: two TUN devices in two network namespaces, packets carried between them as a bad network would.
 *
 * usage: forwarder NETNS_A DEVICE_A NETNS_B DEVICE_B SEED
 * A packet that arrives waits for its turn at the link's rate (or is dropped where the queue is full), may be lost,
 * and comes out at the other end after the delay. A packet that is lost has used its time on the link, as on a radio.
 * Commands come on stdin, one a line; each is answered by one line:
 *   set DIRECTION KEY VALUE      DIRECTION a (from A to B) or b; KEY as in `keys` below, VALUE a number
 *   stats                        counters of both directions as one JSON object
 * It ends with its parent, or when stdin ends. One thread; it sleeps until a packet, a command or the next departure.
 * It makes no ICMP: a too large packet vanishes (a router's own MTU is set on the device and answers as routers do).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <math.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MAX_PACKET = 65536, MAX_HELD = 1 << 17, BATCH = 64 };

struct packet {
    int64_t at;    /* when it comes out, ns */
    uint64_t order; /* ties in order of arrival */
    uint32_t size;
    uint8_t *data;
};

struct direction {
    /* settings */
    double rate;        /* bits per second at IP level; 0: unlimited */
    double delay, jitter; /* seconds; jitter wanders between its ends, so that packets keep their order and their mean */
    double loss;        /* probability */
    double burst;       /* mean packets a loss lasts; 1: independent */
    double reorder, reorder_by; /* probability of an extra delay, seconds of it */
    double duplicate;
    double queue;       /* bytes that may wait */
    double mtu;         /* larger packets vanish; 0: any */
    double down, no_udp, only_port; /* only TCP to or from this port passes; 0: all */
    double police, police_burst; /* bits per second above which packets are dropped, bytes */
    /* state */
    int bad;
    int64_t busy_until, last_out, police_at, turn_at; /* turn_at: when the jitter reaches `toward` */
    double from, toward;
    uint64_t chances;
    double tokens;
    struct packet *heap;
    int count;
    uint64_t order;
    uint64_t in_packets, in_bytes, out_packets, out_bytes;
    uint64_t lost, overflowed, blocked, too_big, policed, while_down;
    int to;             /* fd */
};

static struct { const char *name; size_t at; } keys[] = {
    {"rate", offsetof(struct direction, rate)}, {"delay", offsetof(struct direction, delay)},
    {"jitter", offsetof(struct direction, jitter)}, {"loss", offsetof(struct direction, loss)},
    {"burst", offsetof(struct direction, burst)}, {"reorder", offsetof(struct direction, reorder)},
    {"reorder_by", offsetof(struct direction, reorder_by)}, {"duplicate", offsetof(struct direction, duplicate)},
    {"queue", offsetof(struct direction, queue)}, {"mtu", offsetof(struct direction, mtu)},
    {"down", offsetof(struct direction, down)}, {"no_udp", offsetof(struct direction, no_udp)},
    {"only_port", offsetof(struct direction, only_port)},
    {"police", offsetof(struct direction, police)}, {"police_burst", offsetof(struct direction, police_burst)},
};

static double chance(struct direction *d) { /* splitmix64; each direction draws its own */
    uint64_t z = (d->chances += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return ((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static int before(const struct packet *a, const struct packet *b) {
    return a->at != b->at ? a->at < b->at : a->order < b->order;
}

static void push(struct direction *d, struct packet p) {
    int i = d->count++;
    while (i > 0 && before(&p, &d->heap[(i - 1) / 2])) {
        d->heap[i] = d->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    d->heap[i] = p;
}

static struct packet pop(struct direction *d) {
    struct packet top = d->heap[0], p = d->heap[--d->count];
    int i = 0;
    for (;;) {
        int child = 2 * i + 1;
        if (child >= d->count) break;
        if (child + 1 < d->count && before(&d->heap[child + 1], &d->heap[child])) child++;
        if (!before(&d->heap[child], &p)) break;
        d->heap[i] = d->heap[child];
        i = child;
    }
    d->heap[i] = p;
    return top;
}

static double wandering(struct direction *d, int64_t now) {
    double period = 4 * d->jitter; /* less than a second a second: what left later never comes first */
    while (now >= d->turn_at) {
        d->turn_at = (now - d->turn_at > (int64_t)(period * 1e9) ? now : d->turn_at) + (int64_t)(period * 1e9);
        d->from = d->toward;
        d->toward = (2 * chance(d) - 1) * d->jitter;
    }
    double left = (d->turn_at - now) * 1e-9 / period;
    return d->toward + (d->from - d->toward) * left;
}

static int lost(struct direction *d) {
    if (d->loss <= 0) { d->bad = 0; return 0; }
    if (d->burst <= 1) return chance(d) < d->loss;
    /* Gilbert-Elliott: all is lost in the bad state, nothing in the good one */
    double leave = 1 / d->burst, enter = d->loss * leave / (1 - d->loss);
    d->bad = d->bad ? chance(d) >= leave : chance(d) < enter;
    return d->bad;
}

static int firewalled(const struct direction *d, const uint8_t *data, uint32_t size) {
    if (size < 20 || data[0] >> 4 != 4) return 1; /* what is no IPv4 would go around the rule */
    uint32_t header = (data[0] & 15) * 4u, protocol = data[9];
    if (d->no_udp && protocol == 17) return 1;
    if (!d->only_port) return 0;
    if (protocol != 6 || size < header + 4) return 1;
    uint32_t from = data[header] << 8 | data[header + 1], to = data[header + 2] << 8 | data[header + 3];
    return from != (uint32_t)d->only_port && to != (uint32_t)d->only_port;
}

static void enqueue(struct direction *d, const uint8_t *data, uint32_t size, int64_t out) {
    if (d->count >= MAX_HELD) { d->overflowed++; return; }
    struct packet p = {out, d->order++, size, malloc(size)};
    if (!p.data) { d->overflowed++; return; }
    memcpy(p.data, data, size);
    push(d, p);
}

static void arrived(struct direction *d, const uint8_t *data, uint32_t size, int64_t now) {
    d->in_packets++;
    d->in_bytes += size;
    if (d->down) { d->while_down++; return; }
    if (d->mtu && size > d->mtu) { d->too_big++; return; }
    if ((d->no_udp || d->only_port) && firewalled(d, data, size)) { d->blocked++; return; }
    if (d->police) {
        d->tokens = fmin(d->police_burst, d->tokens + (now - d->police_at) * 1e-9 * d->police / 8);
        d->police_at = now;
        if (d->tokens < size) { d->policed++; return; }
        d->tokens -= size;
    }
    int64_t start = d->busy_until > now ? d->busy_until : now;
    if (d->rate) {
        if (d->queue && (start - now) * 1e-9 * d->rate / 8 + size > d->queue + size * (start == now)) { d->overflowed++; return; }
        start += (int64_t)(size * 8e9 / d->rate);
    }
    d->busy_until = start;
    if (lost(d)) { d->lost++; return; }
    int64_t out = start + (int64_t)(d->delay * 1e9);
    if (d->jitter) out += (int64_t)(wandering(d, start) * 1e9);
    if (out < d->last_out) out = d->last_out; /* a queue keeps order; only `reorder` breaks it */
    d->last_out = out;
    if (d->reorder && chance(d) < d->reorder) out += (int64_t)(d->reorder_by * 1e9);
    enqueue(d, data, size, out);
    if (d->duplicate && chance(d) < d->duplicate) enqueue(d, data, size, out);
}

static void deliver(struct direction *d, int64_t now) {
    while (d->count && d->heap[0].at <= now) {
        struct packet p = pop(d);
        if (write(d->to, p.data, p.size) == (ssize_t)p.size) { d->out_packets++; d->out_bytes += p.size; }
        free(p.data);
    }
}

static int open_tun(const char *netns, const char *device) {
    char path[128];
    snprintf(path, sizeof path, "/run/netns/%s", netns);
    int ns = open(path, O_RDONLY | O_CLOEXEC);
    if (ns < 0 || setns(ns, CLONE_NEWNET) < 0) { fprintf(stderr, "namespace %s: %s\n", netns, strerror(errno)); exit(1); }
    close(ns);
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    snprintf(request.ifr_name, IFNAMSIZ, "%s", device);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request) < 0) { fprintf(stderr, "device %s: %s\n", device, strerror(errno)); exit(1); }
    return fd;
}

static void say(const struct direction *d, const char *name, const char *end) {
    printf("\"%s\":{\"in_packets\":%llu,\"in_bytes\":%llu,\"out_packets\":%llu,\"out_bytes\":%llu,\"lost\":%llu,"
           "\"overflowed\":%llu,\"blocked\":%llu,\"too_big\":%llu,\"policed\":%llu,\"while_down\":%llu}%s",
           name, (unsigned long long)d->in_packets, (unsigned long long)d->in_bytes, (unsigned long long)d->out_packets,
           (unsigned long long)d->out_bytes, (unsigned long long)d->lost, (unsigned long long)d->overflowed,
           (unsigned long long)d->blocked, (unsigned long long)d->too_big, (unsigned long long)d->policed,
           (unsigned long long)d->while_down, end);
}

static void obey(struct direction *two, char *line) {
    char which, key[32];
    double value;
    if (!strncmp(line, "stats", 5)) {
        printf("{");
        say(&two[0], "a", ",");
        say(&two[1], "b", "}\n");
    } else if (sscanf(line, "set %c %31s %lf", &which, key, &value) == 3 && (which == 'a' || which == 'b')) {
        for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
            if (!strcmp(keys[i].name, key)) {
                struct direction *d = &two[which == 'b'];
                int64_t now = now_ns();
                if (!strcmp(key, "rate") && d->rate && value && d->busy_until > now) /* what waits goes at the new rate */
                    d->busy_until = now + (int64_t)((d->busy_until - now) * d->rate / value);
                *(double *)((char *)d + keys[i].at) = value;
                printf("ok\n");
                fflush(stdout);
                return;
            }
        printf("no such setting: %s\n", key);
    } else {
        printf("not understood\n");
    }
    fflush(stdout);
}

int main(int argc, char **argv) {
    if (argc != 6) { fprintf(stderr, "usage: forwarder NETNS_A DEV_A NETNS_B DEV_B SEED\n"); return 2; }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    struct direction two[2] = {{.burst = 1, .queue = 1e6}, {.burst = 1, .queue = 1e6}};
    int fds[2] = {open_tun(argv[1], argv[2]), open_tun(argv[3], argv[4])};
    for (int i = 0; i < 2; i++) {
        two[i].to = fds[!i];
        two[i].chances = strtoull(argv[5], NULL, 10) * 2 + i;
        two[i].heap = malloc(sizeof(struct packet) * (MAX_HELD + 1));
    }
    prctl(PR_SET_TIMERSLACK, 1000);
    printf("ready\n");
    fflush(stdout);
    static uint8_t packet[MAX_PACKET];
    static char line[256];
    size_t have = 0;
    for (;;) {
        int64_t now = now_ns(), next = INT64_MAX;
        for (int i = 0; i < 2; i++) {
            deliver(&two[i], now);
            if (two[i].count && two[i].heap[0].at < next) next = two[i].heap[0].at;
        }
        struct pollfd polled[3] = {{fds[0], POLLIN, 0}, {fds[1], POLLIN, 0}, {0, POLLIN, 0}};
        struct timespec wait = {0, 0}, *timeout = NULL;
        if (next != INT64_MAX) {
            int64_t left = next - now_ns();
            if (left < 0) left = 0;
            wait.tv_sec = left / 1000000000;
            wait.tv_nsec = left % 1000000000;
            timeout = &wait;
        }
        if (ppoll(polled, 3, timeout, NULL) < 0 && errno != EINTR) return 1;
        now = now_ns();
        for (int i = 0; i < 2; i++)
            if (polled[i].revents)
                for (int n = 0; n < BATCH; n++) {
                    ssize_t size = read(fds[i], packet, sizeof packet);
                    if (size <= 0) break;
                    arrived(&two[i], packet, (uint32_t)size, now);
                }
        if (polled[2].revents) {
            ssize_t size = read(0, line + have, sizeof line - 1 - have);
            if (size <= 0) return 0; /* the parent is gone */
            have += size;
            line[have] = 0;
            char *end;
            while ((end = strchr(line, '\n'))) {
                *end = 0;
                obey(two, line);
                have -= end + 1 - line;
                memmove(line, end + 1, have + 1);
            }
            if (have == sizeof line - 1) have = 0;
        }
    }
}
