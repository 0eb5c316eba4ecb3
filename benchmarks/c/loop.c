// Connects to ports, so many at once, for so long: what a checker must do at the least, in C.
//
// loop HOST SECONDS BATCH PORT... prints how many batches it did, the seconds that it took, and the
// seconds of CPU.
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

static double seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

int main(int argc, char **argv) {
    struct sockaddr_in target = {.sin_family = AF_INET};
    inet_pton(AF_INET, argv[1], &target.sin_addr);
    int batch = atoi(argv[3]), ports = argc - 4, epoll = epoll_create1(0);
    double started = seconds(CLOCK_MONOTONIC), elapsed;
    long batches = 0;
    for (; (elapsed = seconds(CLOCK_MONOTONIC) - started) < atof(argv[2]); batches++) {
        for (int n = 0; n < batch; n++) {
            int sock = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
            target.sin_port = htons(atoi(argv[4 + (batches * batch + n) % ports]));
            if (connect(sock, (void *)&target, sizeof target) && errno != EINPROGRESS) return 1;
            struct epoll_event wanted = {.events = EPOLLOUT, .data.fd = sock};
            epoll_ctl(epoll, EPOLL_CTL_ADD, sock, &wanted);
        }
        for (int open = batch; open;) {
            struct epoll_event events[128];
            int ready = epoll_wait(epoll, events, 128, 5000);
            if (ready <= 0) return 1;
            for (; ready--; open--) {
                int error;
                socklen_t size = sizeof error;
                getsockopt(events[ready].data.fd, SOL_SOCKET, SO_ERROR, &error, &size);
                if (error) return 1;
                close(events[ready].data.fd);
            }
        }
    }
    printf("%ld %f %f\n", batches, elapsed, seconds(CLOCK_PROCESS_CPUTIME_ID));
}
