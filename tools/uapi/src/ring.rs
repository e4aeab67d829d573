// SPDX-License-Identifier: GPL-2.0-only

//! An io_uring for servers on a store: it accepts, receives packet descriptors, submits
//! and sends, any number of each with one system call.
//!
//! What the kernel reads or writes while a request is under way belongs to the ring until
//! the request is complete, and is given back with its completion. That is what makes this
//! safe: no caller can free or change it meanwhile.
//!
//! A request names its caller's matter by a number below [`MAX_NAME`], which the completion
//! brings back. The descriptors that a request is for must stay open until the next
//! [`Ring::enter`], which is when the kernel looks them up.

use std::{
    io,
    mem::{size_of, ManuallyDrop},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use io_uring::{cqueue, opcode, squeue, types, IoUring};

use crate::{
    batch::Part,
    socket::{control_len, parse, Desc},
    sys, Batch, Store,
};

/// Names are smaller.
pub const MAX_NAME: u64 = 1 << 60;
/// Requests that wait for [`Ring::enter`] before the queue is handed over early.
const REQUESTS: u32 = 1024;
/// Completions that the kernel has room for. It keeps others until there is.
const COMPLETIONS: u32 = 8192;
/// The ring's only group of rooms.
const GROUP: u16 = 0;
/// How long a ring that is dropped waits for its requests to end.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// What a request's `user_data` says of it, above the name.
const ACCEPT: u64 = 0;
const RECEIVE: u64 = 1;
const SEND: u64 = 2;
const POLL: u64 = 3;
const SUBMIT: u64 = 4;
const CANCEL: u64 = 5;

/// A request that is complete, or one of those that go on that has something.
#[derive(Debug)]
pub enum Done {
    /// A connection that was accepted.
    Accepted {
        /// The listening socket's.
        name: u64,
        /// The connection.
        socket: io::Result<OwnedFd>,
        /// The request goes on.
        more: bool,
    },
    /// Bytes that were received.
    Received {
        /// The socket's.
        name: u64,
        /// How many bytes the descriptors describe; 0 is the end of the stream. EAGAIN: there was
        /// no room left, and is now; ENOBUFS: no free frame in the store; EDQUOT: the socket
        /// holds as much as it may. Nothing is lost.
        bytes: io::Result<usize>,
        /// The request goes on.
        more: bool,
    },
    /// Bytes that were sent.
    Sent {
        /// The socket's.
        name: u64,
        /// How many.
        bytes: io::Result<usize>,
        /// What was to be sent, for its memory.
        buffer: Vec<u8>,
    },
    /// What was polled is ready, or there is an error to be met.
    Ready {
        /// As given.
        name: u64,
    },
    /// A batch was submitted.
    Submitted {
        /// The batch, with its outcomes.
        batch: Batch,
        /// An error of the call: of the operations of that part of it, or with
        /// [`Batch::set_fail`] of the first that failed.
        error: Option<io::Error>,
    },
}

/// An io_uring. For the thread that made it: its completions are made when that enters.
pub struct Ring {
    io: IoUring,
    /// Requests that are not complete.
    under_way: usize,
    enters: u64,
    // Kept if the kernel may still use it when this is dropped.
    held: ManuallyDrop<Held>,
}

/// What the kernel reads and writes.
struct Held {
    rooms: Rooms,
    /// Of what is sent: the name and the bytes.
    sends: Vec<Option<(u64, Vec<u8>)>>,
    vacant: Vec<usize>,
    batch: Option<Submission>,
    /// What receives ask for; copied by the kernel when they begin.
    wanted: Box<libc::msghdr>,
}

struct Submission {
    batch: Batch,
    parts: Box<[Part]>,
    left: usize,
    error: Option<io::Error>,
}

impl Ring {
    /// A ring with `rooms` (a power of 2, up to 32,768) for what is received and not yet taken
    /// from it, each for so many descriptors.
    pub fn new(rooms: u16, descs: usize) -> io::Result<Self> {
        let io = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(COMPLETIONS)
            .build(REQUESTS)?;
        let rooms = Rooms::new(rooms, descs)?;
        // SAFETY: the entries are there as long as the ring is, and aligned to a page.
        unsafe {
            io.submitter()
                .register_buf_ring_with_flags(rooms.memory as u64, rooms.nr, GROUP, 0)?;
        }
        // SAFETY: a msghdr is valid when all zero.
        let mut wanted: Box<libc::msghdr> = Box::new(unsafe { std::mem::zeroed() });
        wanted.msg_controllen = rooms.control as _;
        Ok(Self {
            io,
            under_way: 0,
            enters: 0,
            held: ManuallyDrop::new(Held {
                rooms,
                sends: Vec::new(),
                vacant: Vec::new(),
                batch: None,
                wanted,
            }),
        })
    }

    /// System calls so far.
    pub fn enters(&self) -> u64 {
        self.enters
    }

    /// Sends that are not complete. Usually they are when [`Self::enter`] returns.
    pub fn sends(&self) -> usize {
        self.held.sends.len() - self.held.vacant.len()
    }

    /// Accepts connections until there is an error: sockets that do not block.
    pub fn accept(&mut self, listener: BorrowedFd<'_>, name: u64) -> io::Result<()> {
        let request = opcode::AcceptMulti::new(fd(listener))
            .flags(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC)
            .build();
        // SAFETY: it has no memory.
        unsafe { self.push(request, ACCEPT, name) }
    }

    /// Ends an accept, as [`Self::stop_receiving`] a receive.
    pub fn stop_accepting(&mut self, name: u64) -> io::Result<()> {
        let request = opcode::AsyncCancel::new(tag(ACCEPT, name)).build();
        // SAFETY: it has no memory.
        unsafe { self.push(request, CANCEL, 0) }
    }

    /// Receives from an attached socket in descriptor mode until its stream ends or there is
    /// an error.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, name: u64) -> io::Result<()> {
        let wanted = ptr::from_ref(&*self.held.wanted);
        let request = opcode::RecvMsgMulti::new(fd(socket), wanted, GROUP).build();
        // SAFETY: `wanted` and the rooms are the ring's.
        unsafe { self.push(request, RECEIVE, name) }
    }

    /// Ends a receive: its last completion is ECANCELED, or what came before that.
    pub fn stop_receiving(&mut self, name: u64) -> io::Result<()> {
        let request = opcode::AsyncCancel::new(tag(RECEIVE, name)).build();
        // SAFETY: it has no memory.
        unsafe { self.push(request, CANCEL, 0) }
    }

    /// Sends bytes, waiting until some can be. `more`: others follow at once.
    pub fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        name: u64,
        bytes: Vec<u8>,
        more: bool,
    ) -> io::Result<()> {
        let mut flags = libc::MSG_NOSIGNAL;
        if more {
            flags |= libc::MSG_MORE;
        }
        let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let request = opcode::Send::new(fd(socket), bytes.as_ptr(), len)
            .flags(flags)
            .build();
        let held = &mut *self.held;
        let slot = held.vacant.pop().unwrap_or_else(|| {
            held.sends.push(None);
            held.sends.len() - 1
        });
        // The bytes do not move with their Vec.
        held.sends[slot] = Some((name, bytes));
        // SAFETY: the bytes are the ring's until the completion, which takes them from there.
        unsafe { self.push(request, SEND, slot as u64) }
    }

    /// Waits until something can be read, or if `write` written; once.
    pub fn poll(&mut self, file: BorrowedFd<'_>, name: u64, write: bool) -> io::Result<()> {
        let events = if write { libc::POLLOUT } else { libc::POLLIN };
        let request = opcode::PollAdd::new(fd(file), events as u32).build();
        // SAFETY: it has no memory.
        unsafe { self.push(request, POLL, name) }
    }

    /// Ends all requests for a socket.
    pub fn cancel(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let whom = types::CancelBuilder::fd(fd(socket)).all();
        let request = opcode::AsyncCancel2::new(whom).build();
        // SAFETY: it has no memory.
        unsafe { self.push(request, CANCEL, 0) }
    }

    /// Submits a batch; the sockets that it names must stay open until it is complete. On an
    /// error it is gone: EBUSY, another is under way; EINVAL, there is nothing in it; E2BIG, it is
    /// to be atomic and too long.
    pub fn submit(&mut self, store: &Store, mut batch: Batch) -> io::Result<()> {
        if self.held.batch.is_some() {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        if batch.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let parts = batch.describe()?.into_boxed_slice();
        let args: Vec<u64> = parts
            .iter()
            .map(|part| ptr::from_ref(&part.arg) as u64)
            .collect();
        self.held.batch = Some(Submission {
            batch,
            left: parts.len(),
            parts,
            error: None,
        });
        let last = args.len().saturating_sub(1);
        for (nr, arg) in args.into_iter().enumerate() {
            let mut cmd = [0; 16];
            cmd[..8].copy_from_slice(&arg.to_ne_bytes());
            let mut request = opcode::UringCmd16::new(fd(store.as_fd()), sys::IOC_SUBMIT)
                .cmd(cmd)
                .build();
            if nr < last {
                // In order, and whatever becomes of it.
                request = request.flags(squeue::Flags::IO_HARDLINK);
            }
            // SAFETY: batch and parts are the ring's until all are complete; the arrays that a
            // part points to do not move with the batch.
            unsafe { self.push(request, SUBMIT, nr as u64)? };
        }
        Ok(())
    }

    /// Hands the requests to the kernel and waits: until there are `want` completions or, when
    /// `gather` has passed, one; or for `timeout`. One system call.
    pub fn enter(
        &mut self,
        want: usize,
        gather: Duration,
        timeout: Option<Duration>,
    ) -> io::Result<()> {
        let gather = u32::try_from(gather.as_micros()).unwrap_or(u32::MAX);
        let until = timeout.map(types::Timespec::from);
        let mut args = types::SubmitArgs::new().min_wait_usec(gather);
        if let Some(until) = &until {
            args = args.timespec(until);
        }
        self.enters += 1;
        self.held.rooms.taken = 0;
        match self.io.submitter().submit_with_args(want, &args) {
            Ok(_) => Ok(()),
            Err(e) => match e.raw_os_error() {
                // What was not handed over will be the next time.
                Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(e),
            },
        }
    }

    /// The next completion. Of a receive, `descs` is what it brought.
    pub fn next(&mut self, descs: &mut Vec<Desc>) -> Option<Done> {
        loop {
            let entry = self.io.completion().next()?;
            let more = cqueue::more(entry.flags());
            if !more {
                self.under_way -= 1;
            }
            let name = entry.user_data() & (MAX_NAME - 1);
            let result = match entry.result() {
                e if e < 0 => Err(io::Error::from_raw_os_error(-e)),
                n => Ok(n as usize),
            };
            return Some(match entry.user_data() >> 60 {
                ACCEPT => Done::Accepted {
                    name,
                    socket: result.map(|n| {
                        // SAFETY: the kernel has just made this descriptor, for this request.
                        unsafe { OwnedFd::from_raw_fd(n as i32) }
                    }),
                    more,
                },
                RECEIVE => {
                    descs.clear();
                    let room = cqueue::buffer_select(entry.flags());
                    // A number was not counted if no room was used up.
                    let taken = room.map(|room| self.held.rooms.take(room, descs));
                    let bytes = match result {
                        Ok(_) => taken.unwrap_or(Ok(0)),
                        Err(e) => Err(self.held.rooms.explain(e)),
                    };
                    Done::Received { name, bytes, more }
                }
                SEND => {
                    let slot = name as usize;
                    let Some((name, buffer)) = self.held.sends[slot].take() else {
                        continue;
                    };
                    self.held.vacant.push(slot);
                    Done::Sent {
                        name,
                        bytes: result,
                        buffer,
                    }
                }
                POLL => Done::Ready { name },
                SUBMIT => match self.submitted(name as usize, result.err()) {
                    Some(done) => done,
                    None => continue,
                },
                // A cancel: those that it ended tell themselves.
                _ => continue,
            });
        }
    }

    /// A part of the batch is complete.
    fn submitted(&mut self, part: usize, error: Option<io::Error>) -> Option<Done> {
        let submission = self.held.batch.as_mut()?;
        submission.left -= 1;
        if let Some(e) = error {
            let ops = submission.parts[part].ops.clone();
            submission.batch.refuse(ops, &e);
            submission.error.get_or_insert(e);
        }
        if submission.left > 0 {
            return None;
        }
        let Submission { batch, error, .. } = self.held.batch.take()?;
        Some(Done::Submitted { batch, error })
    }

    /// # Safety
    ///
    /// What the request points to must be valid until it is complete.
    unsafe fn push(&mut self, request: squeue::Entry, kind: u64, name: u64) -> io::Result<()> {
        let request = request.user_data(tag(kind, name));
        // SAFETY: as promised by the caller.
        while unsafe { self.io.submission().push(&request) }.is_err() {
            // Full: handed over early.
            self.enters += 1;
            match self.io.submit() {
                Err(e) if !matches!(e.raw_os_error(), Some(libc::EINTR)) => return Err(e),
                _ => {}
            }
        }
        self.under_way += 1;
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Nothing is left in the queue, and then nothing under way.
        let mut ended = self.io.submit().is_ok();
        let whom = types::CancelBuilder::any();
        let cancelled = self.io.submitter().register_sync_cancel(None, whom);
        ended &= match cancelled {
            Ok(()) => true,
            Err(e) => e.raw_os_error() == Some(libc::ENOENT),
        };
        let mut descs = Vec::new();
        while ended && self.under_way > 0 {
            let before = self.under_way;
            ended = self.enter(1, Duration::ZERO, Some(LAST_WAIT)).is_ok();
            while self.next(&mut descs).is_some() {}
            ended &= self.under_way < before;
        }
        if ended {
            // SAFETY: no request is under way, and this is not used again. (The ring itself, which
            // knows the rooms, is closed next; nothing can ask for them before.)
            unsafe { ManuallyDrop::drop(&mut self.held) };
        }
    }
}

fn fd(of: BorrowedFd<'_>) -> types::Fd {
    types::Fd(of.as_raw_fd())
}

fn tag(kind: u64, name: u64) -> u64 {
    debug_assert!(name < MAX_NAME);
    (kind << 60) | name
}

/// Rooms that the kernel puts what it received into, in memory of their own: first the ring
/// that hands them over, then the rooms.
struct Rooms {
    memory: *mut u8,
    len: usize,
    nr: u16,
    /// Bytes of a room.
    size: usize,
    /// Bytes for control messages in it, behind the header.
    control: usize,
    first: usize,
    /// Rooms handed over so far.
    tail: u16,
    /// Rooms taken since the kernel was last entered. It receives only then, and is done with
    /// what it received before it says that there is no room.
    taken: u16,
}

/// What a room starts with: `struct io_uring_recvmsg_out`.
const HEADER: usize = 16;
const PAGE: usize = 4096;

impl Rooms {
    fn new(nr: u16, descs: usize) -> io::Result<Self> {
        if !nr.is_power_of_two() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let control = control_len(descs).next_multiple_of(size_of::<u64>());
        // Bytes are not wanted: with no room for them there is no bound to what is described.
        let size = (HEADER + control).next_multiple_of(64);
        let first = (usize::from(nr) * size_of::<types::BufRingEntry>()).next_multiple_of(PAGE);
        let len = first + usize::from(nr) * size;
        // SAFETY: a new mapping at a place that the kernel chooses.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mut rooms = Self {
            memory: memory.cast(),
            len,
            nr,
            size,
            control,
            first,
            tail: 0,
            taken: 0,
        };
        for room in 0..nr {
            rooms.give(room);
        }
        Ok(rooms)
    }

    fn room(&self, room: u16) -> *mut u8 {
        self.memory
            .wrapping_add(self.first + usize::from(room) * self.size)
    }

    /// Hands a room over to the kernel, which has none of that number.
    fn give(&mut self, room: u16) {
        let at = self.room(room);
        let slot = usize::from(self.tail & (self.nr - 1));
        let entries: *mut types::BufRingEntry = self.memory.cast();
        // SAFETY: there are `nr` entries at the start of the memory. The kernel does not look at
        // this one before the tail says so.
        let entry = unsafe { &mut *entries.add(slot) };
        entry.set_addr(at as u64);
        entry.set_len((HEADER + self.control) as u32);
        entry.set_bid(room);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail is in the first entry, in a part of it that the above does not write,
        // and both sides use it as an atomic number.
        let tail = unsafe { AtomicU16::from_ptr(types::BufRingEntry::tail(entries).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    /// ENOBUFS says two things: without a room left it is only that, and now there are.
    fn explain(&self, e: io::Error) -> io::Error {
        match e.raw_os_error() {
            Some(libc::ENOBUFS) if self.taken >= self.nr => {
                io::Error::from_raw_os_error(libc::EAGAIN)
            }
            _ => e,
        }
    }

    /// What is in a room, which is then handed over again: how many bytes are described.
    fn take(&mut self, room: u16, descs: &mut Vec<Desc>) -> io::Result<usize> {
        if room >= self.nr {
            return Err(io::Error::other("a room that there is not"));
        }
        let at = self.room(room);
        // namelen, controllen, payloadlen, flags
        // SAFETY: a room starts with the header, which the kernel has filled; it is aligned.
        let [_, control, bytes, flags] = unsafe { at.cast::<[u32; 4]>().read() };
        // SAFETY: a msghdr is valid when all zero.
        let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
        msg.msg_control = at.wrapping_add(HEADER).cast();
        msg.msg_controllen = (control as usize).min(self.control) as _;
        // SAFETY: the kernel has filled so much of the room, which is aligned, and is done with
        // it until it is handed over.
        unsafe { parse(&msg, descs) };
        self.give(room);
        self.taken = self.taken.saturating_add(1);
        if flags & libc::MSG_CTRUNC as u32 != 0 {
            return Err(io::Error::other("control messages were cut off"));
        }
        if bytes > 0 && descs.is_empty() {
            return Err(io::Error::other("bytes without a packet descriptor"));
        }
        Ok(bytes as usize)
    }
}

impl Drop for Rooms {
    fn drop(&mut self) {
        // SAFETY: it is ours, and of this length.
        unsafe { libc::munmap(self.memory.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
    };

    const SOON: Option<Duration> = Some(Duration::from_secs(20));

    /// None where there is no io_uring, or not for us.
    fn ring() -> Option<Ring> {
        match Ring::new(4, 4) {
            Ok(ring) => Some(ring),
            Err(e) => {
                let absent = [libc::ENOSYS, libc::EPERM, libc::EINVAL];
                assert!(absent.contains(&e.raw_os_error().unwrap()), "{e}");
                None
            }
        }
    }

    fn next(ring: &mut Ring) -> Done {
        let mut descs = Vec::new();
        loop {
            if let Some(done) = ring.next(&mut descs) {
                return done;
            }
            ring.enter(1, Duration::ZERO, SOON).unwrap();
        }
    }

    #[test]
    fn a_ring_accepts_and_sends_and_gives_the_bytes_back() {
        let Some(mut ring) = ring() else { return };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        ring.accept(listener.as_fd(), 5).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let Done::Accepted {
            name: 5,
            socket: Ok(socket),
            more: true,
        } = next(&mut ring)
        else {
            panic!("not accepted");
        };
        ring.send(socket.as_fd(), 7, b"hello".to_vec(), false)
            .unwrap();
        let Done::Sent {
            name: 7,
            bytes: Ok(5),
            buffer,
        } = next(&mut ring)
        else {
            panic!("not sent");
        };
        assert_eq!(buffer, b"hello");
        let mut got = [0; 5];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        ring.poll(socket.as_fd(), 9, false).unwrap();
        ring.enter(0, Duration::ZERO, SOON).unwrap();
        client.write_all(b"x").unwrap();
        assert!(matches!(next(&mut ring), Done::Ready { name: 9 }));
    }

    #[test]
    fn what_is_under_way_ends_with_its_socket_and_with_the_ring() {
        let Some(mut ring) = ring() else { return };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        ring.receive(server.as_fd(), 1).unwrap();
        ring.enter(0, Duration::ZERO, SOON).unwrap();
        ring.stop_receiving(1).unwrap();
        let ended = |done: Done| match done {
            Done::Received {
                name: 1,
                bytes: Err(e),
                more: false,
            } => e.raw_os_error(),
            other => panic!("{other:?}"),
        };
        assert_eq!(ended(next(&mut ring)), Some(libc::ECANCELED));
        ring.receive(server.as_fd(), 1).unwrap();
        ring.enter(0, Duration::ZERO, SOON).unwrap();
        ring.cancel(server.as_fd()).unwrap();
        assert_eq!(ended(next(&mut ring)), Some(libc::ECANCELED));
        // More than a socket takes.
        ring.receive(server.as_fd(), 1).unwrap();
        for _ in 0..100 {
            ring.send(server.as_fd(), 2, vec![0; 1 << 20], false)
                .unwrap();
        }
        ring.accept(listener.as_fd(), 3).unwrap();
        ring.enter(0, Duration::ZERO, SOON).unwrap();
        drop(ring);
        drop(client);
    }

    #[test]
    fn rooms_are_a_power_of_two() {
        assert!(Rooms::new(6, 4).is_err());
        let rooms = Rooms::new(8, 256).unwrap();
        assert_eq!(rooms.room(0) as usize % 64, 0);
        assert_eq!(rooms.tail, 8);
    }

    #[test]
    fn no_room_is_told_from_no_frame() {
        let mut rooms = Rooms::new(2, 1).unwrap();
        let mut descs = Vec::new();
        let errno = |rooms: &Rooms| {
            let e = rooms.explain(io::Error::from_raw_os_error(libc::ENOBUFS));
            e.raw_os_error().unwrap()
        };
        assert_eq!(errno(&rooms), libc::ENOBUFS);
        for room in 0..2 {
            assert_eq!(errno(&rooms), libc::ENOBUFS);
            assert_eq!(rooms.take(room, &mut descs).unwrap(), 0);
        }
        assert_eq!(errno(&rooms), libc::EAGAIN);
        assert!(rooms.take(2, &mut descs).is_err());
    }
}
