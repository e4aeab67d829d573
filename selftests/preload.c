// SPDX-License-Identifier: GPL-2.0
/*
 * LD_PRELOAD=preload.so PMSKB_STORE=/dev/pmskb0 program...
 *
 * Attaches every TCP socket that a program listens on or connects, so that
 * programs which know nothing of pmskb run on attached sockets. A failure to
 * attach ends the program: a test must not pass on plain sockets.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/pmskb.h>

static void attach(int fd)
{
	int type = 0, proto = 0, family = 0, store, saved = errno;
	const char *path = getenv("PMSKB_STORE");
	socklen_t len = sizeof(int);
	__s32 arg = fd;

	if (!path)
		return;
	getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len);
	len = sizeof(int);
	getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &proto, &len);
	len = sizeof(int);
	getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &len);
	if (type != SOCK_STREAM || proto != 6 || (family != AF_INET && family != AF_INET6))
		return;
	store = open(path, O_RDWR | O_CLOEXEC);
	if (store < 0 || (ioctl(store, PMSKB_IOC_ATTACH_SOCKET, &arg) && errno != EBUSY)) {
		perror(path);
		_exit(99);
	}
	close(store);
	errno = saved;
}

int listen(int fd, int backlog)
{
	int (*next)(int, int) = (int (*)(int, int))dlsym(RTLD_NEXT, "listen");

	attach(fd);
	return next(fd, backlog);
}

int connect(int fd, const struct sockaddr *addr, socklen_t len)
{
	int (*next)(int, const struct sockaddr *, socklen_t) =
		(int (*)(int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "connect");

	if (addr->sa_family == AF_INET || addr->sa_family == AF_INET6)
		attach(fd);
	return next(fd, addr, len);
}
