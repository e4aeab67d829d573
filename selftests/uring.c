// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about io_uring: submitting to a store as a command, persisting through a
 * socket command, sends that are linked to either, receiving descriptors once and
 * again and again; in the task itself, in a worker, and in a thread that polls.
 */
#include "common.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "harness.h"
#include "objects.h"

FIXTURE(uring) {
	struct store s;
	struct conn c;
	struct net net;
	struct io_uring ring;
	bool open;
};

FIXTURE_VARIANT(uring) {
	int family;
	enum dev dev;
	enum how how;
	unsigned int setup;	/* IORING_SETUP_* */
	unsigned int sqe_flags;	/* of every submit */
};

FIXTURE_VARIANT_ADD(uring, at_once) { AF_INET, DEV_PMEM, HOW_LISTENER_OPT };
FIXTURE_VARIANT_ADD(uring, by_a_worker) { AF_INET6, DEV_DAX, HOW_ACCEPTED_IOCTL, 0, IOSQE_ASYNC };
FIXTURE_VARIANT_ADD(uring, polled) { AF_INET, DEV_PMEM, HOW_LISTENER_IOCTL, IORING_SETUP_SQPOLL };

FIXTURE_SETUP(uring)
{
	struct io_uring_params p = { .flags = variant->setup, .sq_thread_idle = 50 };
	const char *why;
	int err;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	err = io_uring_queue_init_params(256, &self->ring, &p);
	if (err == -EPERM)
		SKIP(return, "io_uring is switched off (kernel.io_uring_disabled)");
	ASSERT_EQ(0, err);
	self->open = true;
	self->net = (struct net) { variant->family, LINK_LO };
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
	ASSERT_EQ(0, conn_make(&self->c, &self->net, self->s.fd, variant->how));
	ASSERT_EQ(0, sock_mode(self->c.s, PMSKB_RX_DESC));
}

/* A ring's requests, with their files, go after the ring, by another thread. */
static int detach_soon(struct store *s, int ms)
{
	int err;

	store_let_go(s);
	for (ms *= slowness();; ms -= 20) {
		err = dev_detach(s->ctl, s->minor, 4000);
		if (err != -EBUSY || ms <= 0)
			break;
		usleep(20000);
	}
	if (!err)
		s->minor = ~0U;
	return err;
}

FIXTURE_TEARDOWN(uring)
{
	struct pmskb_store_info info;

	if (self->open)
		io_uring_queue_exit(&self->ring);
	conn_close(&self->c);
	EXPECT_EQ(0, store_quiet(&self->s, 5000, &info)) TH_LOG("frames are left behind");
	EXPECT_EQ(0, detach_soon(&self->s, 5000));
	store_close(&self->s);
}

/* ---- requests ---- */

static struct io_uring_sqe *get_sqe(struct io_uring *ring, uint64_t tag)
{
	struct io_uring_sqe *sqe;

	/* With a thread that polls, the queue may be full for a moment. */
	while (!(sqe = io_uring_get_sqe(ring)))
		io_uring_submit(ring);
	memset(sqe, 0, sizeof(*sqe));
	sqe->user_data = tag;
	return sqe;
}

static struct io_uring_sqe *put_command(struct io_uring *ring, int fd, const struct pmskb_submit *s,
					uint64_t tag, unsigned int flags)
{
	struct pmskb_uring u = { .arg = PTR(s) };
	struct io_uring_sqe *sqe = get_sqe(ring, tag);

	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = fd;
	sqe->cmd_op = PMSKB_IOC_SUBMIT;
	sqe->flags = flags;
	memcpy((char *)sqe + offsetof(struct io_uring_sqe, cmd), &u, sizeof(u));
	return sqe;
}

static void put_persist(struct io_uring *ring, int sock, const struct pmskb_submit *s, uint64_t tag,
			unsigned int flags)
{
	struct io_uring_sqe *sqe = get_sqe(ring, tag);

	io_uring_prep_cmd_sock(sqe, SOCKET_URING_OP_SETSOCKOPT, sock, SOL_PMSKB, PMSKB_PERSIST,
			       (void *)s, sizeof(*s));
	sqe->user_data = tag;
	sqe->flags = flags;
}

static void put_send(struct io_uring *ring, int sock, const char *text, uint64_t tag, unsigned int flags)
{
	struct io_uring_sqe *sqe = get_sqe(ring, tag);

	io_uring_prep_send(sqe, sock, text, strlen(text), MSG_NOSIGNAL);
	sqe->user_data = tag;
	sqe->flags = flags;
}

#define NO_ANSWER INT_MIN

/* Waits for the next completion: its res, or NO_ANSWER. */
static int answer(struct io_uring *ring, struct io_uring_cqe *copy)
{
	struct __kernel_timespec ts = { .tv_sec = 20 * slowness() };
	struct io_uring_cqe *cqe;
	int res;

	if (io_uring_submit(ring) < 0 || io_uring_wait_cqe_timeout(ring, &cqe, &ts))
		return NO_ANSWER;
	res = cqe->res;
	if (copy)
		*copy = *cqe;
	io_uring_cqe_seen(ring, cqe);
	return res;
}

/* One array by one command: what the ioctl would have returned. */
static int command(struct io_uring *ring, int fd, struct pmskb_op *ops, struct pmskb_result *r,
		   uint32_t nr, uint32_t flags, unsigned int sqe_flags)
{
	struct pmskb_submit s = { .ops = PTR(ops), .results = PTR(r), .nr = nr, .flags = flags };

	put_command(ring, fd, &s, 0, sqe_flags);
	return answer(ring, NULL);
}

/* ---- submitting ---- */

TEST_F(uring, a_command_is_durable_and_answers_each_operation)
{
	static char buf[7000];
	struct pmskb_result r[3];
	struct pmskb_op op[3];
	struct object o[2];
	int n;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 71);
	op[0] = op_put("key", 3, e, n);
	op[0].fd = self->c.s;
	op[1] = op_delete("none", 4);
	op[2] = op_put(NULL, 0, NULL, 0);
	memset(r, 0xa5, sizeof(r));
	ASSERT_EQ(0, command(&self->ring, self->s.fd, op, r, 3, 0, variant->sqe_flags));
	ASSERT_EQ(1, r[0].res);
	EXPECT_EQ(rfc1071(buf, sizeof(buf)), r[0].csum);
	EXPECT_EQ(-ENOENT, r[1].res);
	ASSERT_EQ(2, r[2].res);
	/* The tokens were used. */
	EXPECT_EQ(0, command(&self->ring, self->s.fd, op, r, 1, 0, variant->sqe_flags));
	EXPECT_EQ(-ESTALE, r[0].res);
	o[0] = (struct object) { 1, "key", 3, buf, sizeof(buf) };
	o[1] = (struct object) { 2, "", 0, "", 0 };
	/* The ring's thread may have the file a little longer than its answer is here. */
	io_uring_queue_exit(&self->ring);
	self->open = false;
	conn_close(&self->c);
	ASSERT_EQ(0, detach_soon(&self->s, 5000));
	store_close(&self->s);
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	store_holds(_metadata, &self->s, NULL, variant->dev, o, 2);
}

TEST_F(uring, persist_is_a_socket_command_too)
{
	static char buf[3000];
	struct pmskb_result r;
	struct pmskb_submit s = { .results = PTR(&r), .nr = 1 };
	struct pmskb_op op;
	struct object o;
	int n;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 72);
	op = op_put("key", 3, e, n);
	s.ops = PTR(&op);
	put_persist(&self->ring, self->c.s, &s, 0, variant->sqe_flags);
	ASSERT_EQ(0, answer(&self->ring, NULL));
	ASSERT_EQ(1, r.res);
	s.nr = 0;
	put_persist(&self->ring, self->c.s, &s, 0, variant->sqe_flags);
	EXPECT_EQ(-EINVAL, answer(&self->ring, NULL));
	io_uring_queue_exit(&self->ring);
	self->open = false;
	o = (struct object) { 1, "key", 3, buf, sizeof(buf) };
	conn_close(&self->c);
	ASSERT_EQ(0, detach_soon(&self->s, 5000));
	store_close(&self->s);
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	store_holds(_metadata, &self->s, NULL, variant->dev, &o, 1);
}

/* The three ways to submit an array without extents. */
static int by_any(struct io_uring *ring, int store, int sock, int way, struct pmskb_op *ops,
		  struct pmskb_result *r, uint32_t nr, uint32_t flags, unsigned int sqe_flags)
{
	struct way w = { store, sock, way == 1 };

	memset(r, 0xa5, nr * sizeof(*r));
	return way < 2 ? way_submit(&w, ops, r, nr, flags) : command(ring, store, ops, r, nr, flags, sqe_flags);
}

#define BY_ANY(nr, flags) \
	by_any(&self->ring, self->s.fd, self->c.s, way, op, r, nr, flags, variant->sqe_flags)

TEST_F(uring, an_array_fails_with_its_first_operation_if_that_is_wanted)
{
	const unsigned int both = PMSKB_SUBMIT_FAIL | PMSKB_SUBMIT_ATOMIC;
	struct pmskb_store_info info;
	struct pmskb_result r[3];
	struct pmskb_op op[3];
	int way;

	for (way = 0; way < 3; way++) {
		char key[2] = { 'a' + way, 0 };

		op[0] = op_put(key, 1, NULL, 0);
		op[1] = op_delete("none", 4);
		op[2] = op_put(key, 1, NULL, 0);
		op[2].flags = PMSKB_OP_CREATE;
		EXPECT_EQ(-ENOENT, BY_ANY(3, PMSKB_SUBMIT_FAIL));
		/* All the same it was carried out. */
		EXPECT_LT(0, r[0].res);
		EXPECT_EQ(-ENOENT, r[1].res);
		EXPECT_EQ(-EEXIST, r[2].res);
		EXPECT_EQ(0, BY_ANY(3, 0));
		EXPECT_EQ(0, BY_ANY(1, PMSKB_SUBMIT_FAIL));
		EXPECT_EQ(PMSKB_RES_REPLACED, r[0].flags);
		/* Not with those that another one has cancelled. */
		EXPECT_EQ(-ENOENT, BY_ANY(2, both));
		EXPECT_EQ(-ECANCELED, r[0].res);
		EXPECT_EQ(-ENOENT, r[1].res);
		EXPECT_EQ(0, BY_ANY(1, both));
		EXPECT_EQ(-EINVAL, BY_ANY(1, 1U << 2));
	}
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(3, info.records);
}

TEST_F(uring, a_record_is_sent_after_a_header)
{
	static char buf[30000], head[] = "header", got[sizeof(buf) + 6];
	static char control[CMSG_SPACE(sizeof(struct pmskb_send))];
	struct iovec iov = { head, 6 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control),
	};
	struct pmskb_open o = { .key = PTR("key"), .key_len = 3 };
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
	int n = receive(_metadata, &self->c, buf, sizeof(buf), 74), full, k;
	struct pmskb_op op = op_put("key", 3, e, n);
	static char junk[65536];
	struct io_uring_sqe *sqe;
	struct io_uring_cqe cqe;
	size_t before = 0;

	ASSERT_LT(0, persist_one(self->c.s, &op, NULL));
	ASSERT_EQ(0, ioctl(self->s.fd, PMSKB_IOC_OPEN, &o));
	*c = (struct cmsghdr) { CMSG_LEN(sizeof(struct pmskb_send)), SOL_PMSKB, PMSKB_CMSG_SEND };
	memcpy(CMSG_DATA(c), &(struct pmskb_send) { .fd = o.fd, .len = sizeof(buf) }, sizeof(struct pmskb_send));
	/* At once; and when there is no room, later. */
	for (full = 0; full < 2; full++) {
		ssize_t m;

		while (full && (m = send(self->c.s, junk, sizeof(junk), MSG_DONTWAIT)) > 0)
			before += m;
		sqe = get_sqe(&self->ring, 0);
		io_uring_prep_sendmsg(sqe, self->c.s, &msg, MSG_WAITALL);
		sqe->flags = variant->sqe_flags;
		ASSERT_LE(0, io_uring_submit(&self->ring));
		for (; before; before -= m) {
			m = recv(self->c.c, junk, before < sizeof(junk) ? before : sizeof(junk), 0);
			ASSERT_LT(0, m);
		}
		n = answer(&self->ring, NULL);
		ASSERT_LT(0, n);
		ASSERT_GE(sizeof(got), n);
		if (!full) {
			EXPECT_EQ(sizeof(got), n);
		}
		ASSERT_EQ(0, recv_all(self->c.c, got, n));
		k = n < 6 ? n : 6;
		EXPECT_EQ(0, memcmp(got, head, k));
		EXPECT_EQ(-1, differs(got + k, n - k, 74, 0));
	}
	/* The header from where it lies. */
	sqe = get_sqe(&self->ring, 0);
	io_uring_prep_sendmsg_zc(sqe, self->c.s, &msg, 0);
	sqe->flags = variant->sqe_flags;
	ASSERT_EQ(sizeof(got), answer(&self->ring, &cqe));
	EXPECT_EQ(IORING_CQE_F_MORE, cqe.flags & IORING_CQE_F_MORE);
	ASSERT_EQ(0, recv_all(self->c.c, got, sizeof(got)));
	EXPECT_EQ(0, memcmp(got, head, 6));
	EXPECT_EQ(-1, differs(got + 6, sizeof(buf), 74, 0));
	EXPECT_EQ(0, answer(&self->ring, &cqe));
	EXPECT_EQ(IORING_CQE_F_NOTIF, cqe.flags & IORING_CQE_F_NOTIF);
	/* Its errors. */
	memcpy(CMSG_DATA(c), &(struct pmskb_send) { .fd = o.fd, .len = sizeof(buf) + 1 }, sizeof(struct pmskb_send));
	sqe = get_sqe(&self->ring, 0);
	io_uring_prep_sendmsg(sqe, self->c.s, &msg, 0);
	sqe->flags = variant->sqe_flags;
	EXPECT_EQ(-EINVAL, answer(&self->ring, NULL));
	/* Nothing else was sent. */
	ASSERT_EQ(0, send_all(self->c.s, "end", 3));
	ASSERT_EQ(0, recv_all(self->c.c, got, 3));
	EXPECT_EQ(0, memcmp(got, "end", 3));
	close(o.fd);
}

TEST_F(uring, a_reply_goes_out_when_its_put_is_durable_and_is_cancelled_when_that_failed)
{
	struct pmskb_result r[2];
	struct pmskb_op op[2] = { op_put("a", 1, NULL, 0), op_put("a", 1, NULL, 0) };
	struct pmskb_submit s[2];
	struct pmskb_store_info info;
	struct io_uring_cqe cqe;
	char buf[4] = "";
	int way, i;

	for (way = 0; way < 2; way++) {
		op[0].flags = op[1].flags = 0;
		op[1].flags = PMSKB_OP_CREATE;
		for (i = 0; i < 2; i++) {
			s[i] = (struct pmskb_submit) {
				.ops = PTR(&op[i]), .results = PTR(&r[i]), .nr = 1, .flags = PMSKB_SUBMIT_FAIL,
			};
			if (way)
				put_persist(&self->ring, self->c.s, &s[i], i * 2, variant->sqe_flags | IOSQE_IO_LINK);
			else
				put_command(&self->ring, self->s.fd, &s[i], i * 2, variant->sqe_flags | IOSQE_IO_LINK);
			put_send(&self->ring, self->c.s, i ? "bad" : "yes", i * 2 + 1, 0);
			/* One after the other: only what is linked is in order. */
			if (!i) {
				EXPECT_EQ(0, answer(&self->ring, &cqe));
				EXPECT_EQ(0, cqe.user_data);
				EXPECT_EQ(3, answer(&self->ring, &cqe));
				EXPECT_EQ(1, cqe.user_data);
				ASSERT_EQ(0, recv_all(self->c.c, buf, 3));
				EXPECT_EQ(0, memcmp(buf, "yes", 3));
				ASSERT_EQ(0, store_info(&self->s, &info));
				EXPECT_LE(r[0].res, info.durable_seq);
			} else {
				EXPECT_EQ(-EEXIST, answer(&self->ring, &cqe));
				EXPECT_EQ(2, cqe.user_data);
				EXPECT_EQ(-ECANCELED, answer(&self->ring, &cqe));
				EXPECT_EQ(3, cqe.user_data);
			}
		}
		/* Nothing of the cancelled one is on its way. */
		ASSERT_EQ(0, send_all(self->c.s, "end", 3));
		ASSERT_EQ(0, recv_all(self->c.c, buf, 3));
		EXPECT_EQ(0, memcmp(buf, "end", 3));
	}
	/* An array that is refused cancels it too, without the flag. */
	s[0].flags = 0;
	s[0].nr = 0;
	put_command(&self->ring, self->s.fd, &s[0], 0, variant->sqe_flags | IOSQE_IO_LINK);
	put_send(&self->ring, self->c.s, "bad", 1, 0);
	EXPECT_EQ(-EINVAL, answer(&self->ring, NULL));
	EXPECT_EQ(-ECANCELED, answer(&self->ring, NULL));
}

TEST_F(uring, what_is_wrong_with_a_command_is_its_answer)
{
	struct pmskb_op op = op_put("key", 3, NULL, 0);
	struct pmskb_store_info info;
	struct pmskb_result r;
	struct pmskb_submit s;
	const struct {
		int fd;
		uint32_t cmd_op, cmd_flags;
		uint64_t arg, reserved;
		struct pmskb_submit s;
		int answer;
	} bad[] = {
#define GOOD { PTR(&op), PTR(&r), 1 }
		{ self->s.fd, PMSKB_IOC_INFO, 0, PTR(&s), 0, GOOD, -EOPNOTSUPP },
		{ self->s.fd, PMSKB_IOC_ALLOC, 0, PTR(&s), 0, GOOD, -EOPNOTSUPP },
		{ self->s.fd, 0, 0, PTR(&s), 0, GOOD, -EOPNOTSUPP },
		{ self->s.ctl, PMSKB_IOC_SUBMIT, 0, PTR(&s), 0, GOOD, -EOPNOTSUPP },
		{ self->s.fd, PMSKB_IOC_SUBMIT, 0, PTR(&s), 1, GOOD, -EINVAL },
		{ self->s.fd, PMSKB_IOC_SUBMIT, 0, PTR(&s), 1ULL << 63, GOOD, -EINVAL },
		{ self->s.fd, PMSKB_IOC_SUBMIT, IORING_URING_CMD_FIXED, PTR(&s), 0, GOOD, -EINVAL },
		{ self->s.fd, PMSKB_IOC_SUBMIT, 0, 0, 0, GOOD, -EFAULT },
		{ self->s.fd, PMSKB_IOC_SUBMIT, 0, PTR(BAD_PTR), 0, GOOD, -EFAULT },
		{ self->s.fd, PMSKB_IOC_SUBMIT, 0, 1ULL << 63, 0, GOOD, -EFAULT },
		{ self->s.fd, PMSKB_IOC_SUBMIT, 0, PTR(&s), 0, { PTR(&op), PTR(&r), 0 }, -EINVAL },
		{ self->s.fd, PMSKB_IOC_SUBMIT, 0, PTR(&s), 0, { PTR(&op), PTR(&r), PMSKB_MAX_OPS + 1 }, -E2BIG },
		{ self->s.fd, PMSKB_IOC_SUBMIT, 0, PTR(&s), 0, { PTR(&op), PTR(&r), 1, ~0U }, -EINVAL },
		{ self->s.fd, PMSKB_IOC_SUBMIT, 0, PTR(&s), 0, { PTR(&op), PTR(&r), 1, 0, 1 }, -EINVAL },
		{ self->s.fd, PMSKB_IOC_SUBMIT, 0, PTR(&s), 0, { PTR(BAD_PTR), PTR(&r), 1 }, -EFAULT },
		{ self->s.fd, PMSKB_IOC_SUBMIT, 0, PTR(&s), 0, { PTR(&op), PTR(BAD_PTR), 1 }, -EFAULT },
		{ -1, PMSKB_IOC_SUBMIT, 0, PTR(&s), 0, GOOD, -EBADF },
	};
	int fd, i;

	for (i = 0; i < (int)ARRAY_LEN(bad); i++) {
		struct pmskb_uring u = { bad[i].arg, bad[i].reserved };
		struct io_uring_sqe *sqe;

		s = bad[i].s;
		sqe = put_command(&self->ring, bad[i].fd, &s, 0, variant->sqe_flags);
		sqe->cmd_op = bad[i].cmd_op;
		sqe->uring_cmd_flags = bad[i].cmd_flags;
		memcpy((char *)sqe + offsetof(struct io_uring_sqe, cmd), &u, sizeof(u));
		EXPECT_EQ(bad[i].answer, answer(&self->ring, NULL)) TH_LOG("case %d", i);
	}
	fd = open(self->s.path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, fd);
	EXPECT_EQ(-EACCES, command(&self->ring, fd, &op, &r, 1, 0, variant->sqe_flags));
	close(fd);
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(0, info.records) TH_LOG("something was done");
	/* And the ring is as good as before. */
	EXPECT_EQ(0, command(&self->ring, self->s.fd, &op, &r, 1, 0, variant->sqe_flags));
	EXPECT_EQ(1, r.res);
}

TEST_F(uring, a_registered_file_is_an_open_file)
{
	struct pmskb_op op = op_put("key", 3, NULL, 0);
	struct pmskb_result r;

	ASSERT_EQ(0, io_uring_register_files(&self->ring, &self->s.fd, 1));
	store_let_go(&self->s);
	conn_close(&self->c);
	EXPECT_EQ(-EBUSY, dev_detach(self->s.ctl, self->s.minor, 1));
	EXPECT_EQ(0, command(&self->ring, 0, &op, &r, 1, 0, variant->sqe_flags | IOSQE_FIXED_FILE));
	EXPECT_EQ(1, r.res);
	ASSERT_EQ(0, io_uring_unregister_files(&self->ring));
	EXPECT_EQ(0, detach_soon(&self->s, 5000));
	store_close(&self->s);
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	EXPECT_EQ(1, self->s.info.records);
}

TEST_F(uring, a_store_whose_device_has_gone_answers_so)
{
	struct pmskb_op op = op_put("key", 3, NULL, 0);
	char driver[PATH_MAX], name[PATH_MAX];
	struct pmskb_result r;

	if (variant->dev != DEV_PMEM)
		SKIP(return, "once is enough");
	ASSERT_EQ(0, driver_of(variant->dev, driver, name, PATH_MAX));
	ASSERT_EQ(0, command(&self->ring, self->s.fd, &op, &r, 1, 0, variant->sqe_flags));
	ASSERT_EQ(0, sh("echo %s >%s/unbind", name, driver));
	EXPECT_EQ(0, command(&self->ring, self->s.fd, &op, &r, 1, 0, variant->sqe_flags));
	EXPECT_EQ(-EIO, r.res);
	EXPECT_EQ(-EIO, command(&self->ring, self->s.fd, &op, &r, 1, PMSKB_SUBMIT_FAIL, variant->sqe_flags));
	conn_close(&self->c);
	EXPECT_EQ(0, detach_soon(&self->s, 5000));
	store_close(&self->s);
	EXPECT_EQ(0, sh("for i in 1 2 3 4 5 6 7 8 9; do echo %s >%s/bind && break; sleep 0.1; done", name, driver));
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	EXPECT_EQ(1, self->s.info.records);
}

struct rival {
	int store;
	bool stop;
	int wrong;
};

static void *submit_again_and_again(void *arg)
{
	static struct pmskb_result r[200];
	struct pmskb_op op[200];
	struct rival *rival = arg;
	int i;

	for (i = 0; i < 200; i++)
		op[i] = op_put("rival", 5, NULL, 0);
	while (!__atomic_load_n(&rival->stop, __ATOMIC_RELAXED))
		rival->wrong |= submit(rival->store, op, r, 200);
	return NULL;
}

/*
 * The ring's task is not kept waiting while others change the store: a worker does
 * it then, once, and the answer is the same.
 */
TEST_F(uring, a_busy_store_is_waited_for_and_never_an_error)
{
	struct pmskb_op op = op_put(NULL, 0, NULL, 0);
	struct rival rival = { .store = self->s.fd };
	static struct pmskb_result r[100];
	struct pmskb_submit s[100];
	struct pmskb_store_info info;
	uint64_t before;
	pthread_t t;
	int i;

	ASSERT_EQ(0, store_info(&self->s, &info));
	before = info.records;
	ASSERT_EQ(0, pthread_create(&t, NULL, submit_again_and_again, &rival));
	for (i = 0; i < 100; i++) {
		s[i] = (struct pmskb_submit) { .ops = PTR(&op), .results = PTR(&r[i]), .nr = 1 };
		put_command(&self->ring, self->s.fd, &s[i], i, variant->sqe_flags);
		io_uring_submit(&self->ring);
	}
	for (i = 0; i < 100; i++)
		EXPECT_EQ(0, answer(&self->ring, NULL));
	__atomic_store_n(&rival.stop, true, __ATOMIC_RELAXED);
	pthread_join(t, NULL);
	EXPECT_EQ(0, rival.wrong);
	for (i = 0; i < 100; i++)
		EXPECT_LT(0, r[i].res);
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_LE(before + 100, info.records);
	EXPECT_GE(before + 101, info.records) TH_LOG("something was done twice");
}

/* ---- receiving ---- */

/* Room for a few descriptors, as a receive that goes on and on needs it. */
#define FEW 4
struct room {
	struct io_uring_recvmsg_out out;
	char control[FEW * CMSG_SPACE(sizeof(struct pmskb_desc))];
};

/* The descriptors in a control buffer. */
static int parse_control(void *control, size_t len, struct pmskb_desc *d, int max)
{
	struct msghdr msg = { .msg_control = control, .msg_controllen = len };
	struct cmsghdr *cmsg;
	int n = 0;

	for (cmsg = CMSG_FIRSTHDR(&msg); cmsg && n < max; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
		if (cmsg->cmsg_level == SOL_PMSKB && cmsg->cmsg_type == PMSKB_CMSG_DESC)
			memcpy(&d[n++], CMSG_DATA(cmsg), sizeof(*d));
	}
	return n;
}

/* Where the bytes that n descriptors name differ from a stream's, or -1. */
static ssize_t described(const struct store *s, const struct pmskb_desc *d, int n, uint32_t seed, uint64_t pos)
{
	for (int i = 0; i < n; pos += d[i++].len) {
		ssize_t at = differs(s->map + d[i].offset, d[i].len, seed, pos);

		if (at >= 0)
			return pos + at;
	}
	return -1;
}

TEST_F(uring, a_receive_gives_descriptors)
{
	char control[FEW * CMSG_SPACE(sizeof(struct pmskb_desc))], buf[1000];
	struct msghdr msg = { .msg_control = control, .msg_controllen = sizeof(control) };
	struct pmskb_result r;
	struct pmskb_op op;
	int n;

	fill(buf, sizeof(buf), 73, 0);
	/* It waits for what is still to come. */
	io_uring_prep_recvmsg(get_sqe(&self->ring, 1), self->c.s, &msg, 0);
	io_uring_submit(&self->ring);
	ASSERT_EQ(0, send_all(self->c.c, buf, sizeof(buf)));
	ASSERT_EQ(sizeof(buf), answer(&self->ring, NULL));
	n = parse_control(control, msg.msg_controllen, d, FEW);
	ASSERT_LT(0, n);
	EXPECT_EQ(-1, described(&self->s, d, n, 73, 0));
	exts_of(e, d, n);
	op = op_put("key", 3, e, n);
	op.fd = self->c.s;
	ASSERT_EQ(0, command(&self->ring, self->s.fd, &op, &r, 1, 0, variant->sqe_flags));
	EXPECT_EQ(rfc1071(buf, sizeof(buf)), r.csum);
	/* Room for none is an error here as well, and takes nothing. */
	ASSERT_EQ(0, send_all(self->c.c, buf, sizeof(buf)));
	msg = (struct msghdr) { .msg_control = control, .msg_controllen = sizeof(struct cmsghdr) };
	io_uring_prep_recvmsg(get_sqe(&self->ring, 2), self->c.s, &msg, 0);
	EXPECT_EQ(-EMSGSIZE, answer(&self->ring, NULL));
	n = desc_recv_bytes(self->c.s, d, MAX_DESC, sizeof(buf));
	ASSERT_LT(0, n);
	EXPECT_EQ(-1, described(&self->s, d, n, 73, 0));
	EXPECT_EQ(0, desc_release_all(self->c.s, d, n));
}

TEST_F(uring, nothing_is_lost_when_a_receive_that_goes_on_runs_out_of_buffers)
{
	const int nr = 4, messages = 24, size = 3000;
	struct msghdr msg = { .msg_controllen = sizeof(((struct room *)0)->control) };
	int ran_out = 0, ends = 0, at_hand = 0, n, i, err;
	struct io_uring_buf_ring *bufs;
	struct io_uring_cqe cqe;
	static struct room room[4];
	static char buf[3000];
	bool armed = false;
	uint64_t pos = 0;
	int held[4];

	bufs = io_uring_setup_buf_ring(&self->ring, nr, 7, 0, &err);
	ASSERT_NE(NULL, bufs);
	for (i = 0; i < nr; i++)
		io_uring_buf_ring_add(bufs, &room[i], sizeof(room[i]), i, nr - 1, i);
	io_uring_buf_ring_advance(bufs, nr);
	for (i = 0; i < messages; i++) {
		fill(buf, size, 74, (uint64_t)i * size);
		ASSERT_EQ(0, send_all(self->c.c, buf, size));
	}
	ASSERT_EQ(0, shutdown(self->c.c, SHUT_WR));
	while (!ends) {
		if (!armed) {
			struct io_uring_sqe *sqe = get_sqe(&self->ring, 9);

			io_uring_prep_recvmsg_multishot(sqe, self->c.s, &msg, 0);
			sqe->user_data = 9;
			sqe->flags |= IOSQE_BUFFER_SELECT;
			sqe->buf_group = 7;
			armed = true;
		}
		ASSERT_NE(NO_ANSWER, answer(&self->ring, &cqe));
		ASSERT_EQ(9, cqe.user_data);
		armed = cqe.flags & IORING_CQE_F_MORE;
		if (cqe.res == -ENOBUFS) {
			ran_out++;
			ASSERT_FALSE(armed);
			ASSERT_EQ(nr, at_hand) TH_LOG("there were buffers");
			/* Only now they are given back. */
			for (i = 0; i < nr; i++)
				io_uring_buf_ring_add(bufs, &room[held[i]], sizeof(room[0]), held[i], nr - 1, i);
			io_uring_buf_ring_advance(bufs, nr);
			at_hand = 0;
			continue;
		}
		ASSERT_LE((int)sizeof(struct room), cqe.res) TH_LOG("%s", strerror(-cqe.res));
		ASSERT_TRUE(cqe.flags & IORING_CQE_F_BUFFER);
		i = cqe.flags >> IORING_CQE_BUFFER_SHIFT;
		ASSERT_GT(nr, i);
		held[at_hand++] = i;
		ASSERT_EQ(0, room[i].out.flags & MSG_CTRUNC);
		n = parse_control(room[i].control, room[i].out.controllen, d, FEW);
		if (!room[i].out.payloadlen) {
			EXPECT_EQ(0, n);
			EXPECT_FALSE(armed);
			ends++;
			continue;
		}
		ASSERT_LT(0, n);
		ASSERT_EQ(-1, described(&self->s, d, n, 74, pos));
		for (i = 0; i < n; i++)
			pos += d[i].len;
		ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
		/* One that came together with the end of buffers stays for the next round. */
	}
	EXPECT_EQ(messages * size, pos);
	EXPECT_LT(0, ran_out);
	io_uring_free_buf_ring(&self->ring, bufs, nr, 7);
}

/* ---- the end ---- */

/* Requests of all kinds that are not done: a receive that goes on, and arrays. */
static void leave_requests(struct io_uring *ring, int store, int sock, struct pmskb_submit *s, int nr)
{
	static char control[CMSG_SPACE(sizeof(struct pmskb_desc))];
	static struct msghdr msg;
	int i;

	msg = (struct msghdr) { .msg_control = control, .msg_controllen = sizeof(control) };
	io_uring_prep_recvmsg(get_sqe(ring, 1), sock, &msg, 0);
	for (i = 0; i < nr; i++)
		put_command(ring, store, s, 2, IOSQE_ASYNC);
	io_uring_submit(ring);
}

TEST_F(uring, a_ring_that_goes_in_the_middle_leaves_nothing_behind)
{
	struct pmskb_store_info info;
	static struct pmskb_result r[4];
	static struct pmskb_op op[4];
	struct pmskb_submit s = { PTR(op), PTR(r), 4 };
	static char buf[2000];
	int n, i, st;
	pid_t pid;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 75);
	for (i = 0; i < 4; i++) {
		op[i] = op_put(&"abcd"[i], 1, e, n);
		op[i].fd = self->c.s;
		op[i].flags = PMSKB_OP_KEEP;
	}
	/* Closed. */
	leave_requests(&self->ring, self->s.fd, self->c.s, &s, 64);
	io_uring_queue_exit(&self->ring);
	self->open = false;
	/* Of a process that dies. */
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		struct io_uring_params p = { .flags = variant->setup };
		struct io_uring ring;

		if (io_uring_queue_init_params(256, &ring, &p))
			_exit(1);
		leave_requests(&ring, self->s.fd, self->c.s, &s, 64);
		raise(SIGKILL);
	}
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	ASSERT_TRUE(WIFSIGNALED(st));
	conn_close(&self->c);
	/* No token, no socket, no frame but those of what was put. */
	EXPECT_EQ(0, store_quiet(&self->s, 5000 * slowness(), &info));
	for (i = 0; i < 250 * slowness() && info.sockets; i++) {
		usleep(20000);
		ASSERT_EQ(0, store_info(&self->s, &info));
	}
	EXPECT_EQ(0, info.sockets);
	EXPECT_EQ(0, info.tokens);
	EXPECT_GE(4, info.records);
	EXPECT_EQ(NULL, info_wrong(&info, 0, true)) TH_LOG("%s", info_wrong(&info, 0, true));
	EXPECT_EQ(0, detach_soon(&self->s, 5000));
	store_close(&self->s);
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
}

/* ---- a server ---- */

#define CONNS 64
#define ROUNDS 20
#define REQUEST 200

/* The clients: each sends a request and waits for its answer, again and again. */
static int ask(int *sock)
{
	char buf[REQUEST], reply[3];
	int round, i;

	for (round = 0; round < ROUNDS; round++) {
		for (i = 0; i < CONNS; i++) {
			fill(buf, sizeof(buf), i, round * REQUEST);
			if (send_all(sock[i], buf, sizeof(buf)))
				return 1;
		}
		for (i = 0; i < CONNS; i++)
			if (recv_all(sock[i], reply, 3) || memcmp(reply, "yes", 3))
				return 2;
	}
	return 0;
}

TEST(a_batch_of_many_sockets_is_taken_persisted_and_answered_with_one_system_call)
{
	const unsigned int setup = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
	static struct room room[4 * CONNS];
	static struct pmskb_result r[CONNS];
	static struct pmskb_op op[CONNS];
	static struct pmskb_ext ext[CONNS][FEW];
	static struct conn c[CONNS];
	struct msghdr msg = { .msg_controllen = sizeof(room[0].control) };
	struct pmskb_submit s = { PTR(op), PTR(r), 0, PMSKB_SUBMIT_FAIL };
	struct __kernel_timespec ts = { .tv_sec = 20 * slowness() };
	int i, n, err, st, calls = 0, requests = 0, wait = CONNS;
	struct net net = { AF_INET, LINK_LO };
	struct io_uring_buf_ring *bufs;
	struct pmskb_store_info info;
	int sock[CONNS], pipe_fd[2];
	struct io_uring ring;
	struct store store;
	const char *why;
	pid_t pid;

	if (!dev_path(DEV_PMEM, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&store, DEV_PMEM, 0, 0));
	ASSERT_EQ(0, pipe(pipe_fd));
	for (i = 0; i < CONNS; i++) {
		ASSERT_EQ(0, conn_make(&c[i], &net, store.fd, HOW_LISTENER_OPT));
		ASSERT_EQ(0, sock_mode(c[i].s, PMSKB_RX_DESC));
		sock[i] = c[i].c;
	}
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid) {
		store_let_go(&store);
		for (i = 0; i < CONNS; i++)
			close(c[i].s);
		_exit(ask(sock));
	}
	ASSERT_EQ(0, io_uring_queue_init(256, &ring, setup));
	bufs = io_uring_setup_buf_ring(&ring, ARRAY_LEN(room), 0, 0, &err);
	ASSERT_NE(NULL, bufs);
	for (i = 0; i < (int)ARRAY_LEN(room); i++)
		io_uring_buf_ring_add(bufs, &room[i], sizeof(room[i]), i, ARRAY_LEN(room) - 1, i);
	io_uring_buf_ring_advance(bufs, ARRAY_LEN(room));
	for (i = 0; i < CONNS; i++) {
		struct io_uring_sqe *sqe = get_sqe(&ring, i);

		io_uring_prep_recvmsg_multishot(sqe, c[i].s, &msg, 0);
		sqe->user_data = i;
		sqe->flags |= IOSQE_BUFFER_SELECT;
	}
	while (requests < ROUNDS * CONNS) {
		struct io_uring_cqe *cqe;
		unsigned int head, seen = 0;

		/* The one call: persists, answers, and takes the next requests. */
		calls++;
		err = io_uring_submit_and_wait_timeout(&ring, &cqe, wait, &ts, NULL);
		ASSERT_LE(0, err) TH_LOG("%s", strerror(-err));
		s.nr = 0;
		io_uring_for_each_cqe(&ring, head, cqe) {
			seen++;
			if (cqe->user_data >= CONNS) {
				ASSERT_EQ(cqe->user_data == CONNS ? 0 : 3, cqe->res) TH_LOG("%s", strerror(-cqe->res));
				continue;
			}
			ASSERT_LT(0, cqe->res) TH_LOG("%s", strerror(-cqe->res));
			ASSERT_TRUE(cqe->flags & IORING_CQE_F_MORE);
			i = cqe->flags >> IORING_CQE_BUFFER_SHIFT;
			n = parse_control(room[i].control, room[i].out.controllen, d, FEW);
			ASSERT_EQ(REQUEST, room[i].out.payloadlen);
			exts_of(ext[s.nr], d, n);
			op[s.nr] = op_put(NULL, 0, ext[s.nr], n);
			op[s.nr++].fd = c[cqe->user_data].s;
			io_uring_buf_ring_add(bufs, &room[i], sizeof(room[i]), i, ARRAY_LEN(room) - 1, 0);
			io_uring_buf_ring_advance(bufs, 1);
		}
		io_uring_cq_advance(&ring, seen);
		requests += s.nr;
		/* The array, the last answer, and what all of the clients send then. */
		wait = CONNS + 2;
		if (!s.nr)
			continue;
		put_command(&ring, store.fd, &s, CONNS, IOSQE_IO_LINK);
		for (i = 0; i < (int)s.nr; i++) {
			unsigned int flags = IOSQE_CQE_SKIP_SUCCESS | IOSQE_IO_LINK;

			if (i + 1 == (int)s.nr)
				flags = 0;
			put_send(&ring, op[i].fd, "yes", CONNS + 1, flags);
		}
	}
	calls++;
	ASSERT_LE(0, io_uring_submit_and_wait(&ring, 2));
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	EXPECT_EQ(0, WIFEXITED(st) ? WEXITSTATUS(st) : -1);
	TH_LOG("%d requests, %d calls of io_uring_enter", requests, calls);
	EXPECT_GE(requests / 10, calls) TH_LOG("more than 0.1 a request");
	ASSERT_EQ(0, store_info(&store, &info));
	EXPECT_EQ(ROUNDS * CONNS, info.records);
	EXPECT_EQ(ROUNDS * CONNS * REQUEST, info.live_bytes);
	EXPECT_EQ(0, info.tokens);
	io_uring_queue_exit(&ring);
	for (i = 0; i < CONNS; i++)
		conn_close(&c[i]);
	EXPECT_EQ(0, detach_soon(&store, 5000));
	store_close(&store);
}

TEST_HARNESS_MAIN
