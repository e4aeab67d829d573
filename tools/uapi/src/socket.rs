// SPDX-License-Identifier: GPL-2.0-only

//! An attached socket.

use std::{
    ffi::c_void,
    io,
    mem::size_of,
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
};

use crate::{error, sys, Batch, Error, Result};

/// What receive calls return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RxMode {
    /// Bytes, as on any socket.
    Bytes,
    /// Packet descriptors.
    Desc,
}

/// A packet descriptor: received bytes, named and not copied.
#[derive(Debug, Clone, Copy)]
pub struct Desc(sys::pmskb_desc);

impl Desc {
    /// Of the first byte in the store.
    pub fn offset(&self) -> u64 {
        self.0.offset
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u32 {
        self.0.len
    }

    /// The hold.
    pub fn token(&self) -> u32 {
        self.0.token
    }

    /// As the module gave it.
    pub fn raw(&self) -> &sys::pmskb_desc {
        &self.0
    }
}

/// Room for what one receive call returns; to be reused.
#[derive(Debug)]
pub struct RecvBuffer {
    control: Vec<u64>,
    descs: Vec<Desc>,
    reserve: Reserve,
}

/// Most payload bytes that one receive call describes.
const RECV_BYTES: usize = 64 << 20;

/// Bytes of address space without memory. In descriptor mode nothing is written
/// to the caller's buffer, but its length is the limit of what is described. If
/// the socket is in byte mode after all, the call fails with EFAULT.
#[derive(Debug)]
struct Reserve(*mut c_void);

// SAFETY: nobody reads or writes through the pointer.
unsafe impl Send for Reserve {}

impl Reserve {
    fn new() -> io::Result<Self> {
        // SAFETY: a new mapping at a place that the kernel chooses.
        let p = unsafe {
            libc::mmap(
                ptr::null_mut(),
                RECV_BYTES,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(p))
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        // SAFETY: it is ours, and of this length.
        unsafe { libc::munmap(self.0, RECV_BYTES) };
    }
}

impl RecvBuffer {
    /// Room for `descs` packet descriptors.
    pub fn new(descs: usize) -> io::Result<Self> {
        Ok(Self {
            control: vec![0; control_len(descs).div_ceil(size_of::<u64>())],
            descs: Vec::with_capacity(descs),
            reserve: Reserve::new()?,
        })
    }

    /// Receives what is there, without waiting. An empty slice is the end of the
    /// stream; `WouldBlock` that there is nothing now. What was received before
    /// is forgotten (but its tokens are still held).
    pub fn recv(&mut self, socket: BorrowedFd<'_>) -> io::Result<&[Desc]> {
        self.descs.clear();
        let mut iov = libc::iovec {
            iov_base: self.reserve.0,
            iov_len: RECV_BYTES,
        };
        // SAFETY: a msghdr is valid when all zero.
        let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
        msg.msg_iov = &mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = self.control.as_mut_ptr().cast();
        msg.msg_controllen = (self.control.len() * size_of::<u64>()) as _;
        // SAFETY: `msg` describes a control buffer that is ours to write, and a
        // data buffer that cannot be written, which is an error and no harm.
        let n = unsafe {
            libc::recvmsg(
                socket.as_raw_fd(),
                &mut msg,
                libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
            )
        };
        if n < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has filled the buffer that `msg` describes, and
        // set msg_controllen to how far; it is suitably aligned.
        unsafe { parse(&msg, &mut self.descs) };
        if msg.msg_flags & libc::MSG_CTRUNC != 0 {
            return Err(io::Error::other("control messages were cut off"));
        }
        if n > 0 && self.descs.is_empty() {
            return Err(io::Error::other("bytes without a packet descriptor"));
        }
        Ok(&self.descs)
    }
}

/// Adds the packet descriptors of a receive to `descs`.
///
/// # Safety
///
/// `msg` must describe a valid, aligned and filled control buffer.
pub(crate) unsafe fn parse(msg: &libc::msghdr, descs: &mut Vec<Desc>) {
    // SAFETY: as promised by the caller.
    let mut cmsg = unsafe { libc::CMSG_FIRSTHDR(msg) };
    while !cmsg.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return headers that lie
        // within the buffer.
        let header = unsafe { &*cmsg };
        // SAFETY: computes a number.
        let wanted = unsafe { libc::CMSG_LEN(size_of::<sys::pmskb_desc>() as u32) } as usize;
        if header.cmsg_level == sys::SOL_PMSKB as i32
            && header.cmsg_type == sys::PMSKB_CMSG_DESC as i32
            && header.cmsg_len as usize >= wanted
        {
            // SAFETY: the message is long enough for one, which may be
            // unaligned.
            let desc = unsafe { ptr::read_unaligned(libc::CMSG_DATA(cmsg).cast()) };
            descs.push(Desc(desc));
        }
        // SAFETY: as for the first.
        cmsg = unsafe { libc::CMSG_NXTHDR(msg, cmsg) };
    }
}

/// Bytes of a control buffer with room for so many packet descriptors.
pub(crate) fn control_len(descs: usize) -> usize {
    // SAFETY: computes a number.
    let one = unsafe { libc::CMSG_SPACE(size_of::<sys::pmskb_desc>() as u32) } as usize;
    one * descs.max(1)
}

/// Attaches by the pair of socket options, instead of [`Store::attach_socket`].
///
/// [`Store::attach_socket`]: crate::Store::attach_socket
pub fn attach(socket: BorrowedFd<'_>, store: BorrowedFd<'_>) -> Result<()> {
    let name = sys::PMSKB_ULP_NAME;
    // SAFETY: a name of that length.
    unsafe {
        set(
            socket,
            libc::IPPROTO_TCP,
            libc::TCP_ULP,
            name.as_ptr().cast(),
            name.len() - 1,
        )
    }
    .map_err(|e| {
        const NO_ULP: (i32, &str) = (
            libc::ENOENT,
            "the module is not loaded: run `modprobe pmskb`",
        );
        let mut hints = error::ATTACH_SOCKET.to_vec();
        hints.push(NO_ULP);
        Error::new("cannot give the socket the protocol \"pmskb\"", e, &hints)
    })?;
    let fd = store.as_raw_fd();
    // SAFETY: an int.
    unsafe { set_one(socket, sys::PMSKB_ATTACH, &fd) }
        .map_err(|e| Error::new("cannot attach the socket", e, error::ATTACH_SOCKET))
}

/// Chooses what receive calls return.
pub fn set_rx_mode(socket: BorrowedFd<'_>, mode: RxMode) -> Result<()> {
    let mode: u32 = match mode {
        RxMode::Bytes => sys::PMSKB_RX_BYTES,
        RxMode::Desc => sys::PMSKB_RX_DESC,
    };
    // SAFETY: a __u32.
    unsafe { set_one(socket, sys::PMSKB_RX_MODE, &mode) }.map_err(|e| {
        const NOT_ATTACHED: (i32, &str) =
            (libc::ENOPROTOOPT, "the socket is not attached to a store");
        Error::new("cannot set the socket's receive mode", e, &[NOT_ATTACHED])
    })
}

/// Has the module make a log record of all that the socket receives, before anybody gets it.
pub fn set_auto_persist(socket: BorrowedFd<'_>, on: bool) -> Result<()> {
    // SAFETY: a __u32.
    unsafe { set_one(socket, sys::PMSKB_AUTO_PERSIST, &u32::from(on)) }
        .map_err(|e| Error::new("cannot have what the socket receives persisted", e, &[]))
}

/// The socket's counters.
pub fn info(socket: BorrowedFd<'_>) -> Result<sys::pmskb_sock_info> {
    let mut info = sys::pmskb_sock_info::default();
    let mut len = size_of_val(&info) as libc::socklen_t;
    // SAFETY: a struct pmskb_sock_info, and its length.
    let r = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            sys::SOL_PMSKB as i32,
            sys::PMSKB_INFO as i32,
            ptr::from_mut(&mut info).cast(),
            &mut len,
        )
    };
    if r < 0 {
        return Err(Error::last("cannot read the socket's counters", &[]));
    }
    Ok(info)
}

/// Submits a batch through the socket whose tokens it names: the operations'
/// `fd` must be -1.
pub fn persist(socket: BorrowedFd<'_>, batch: &mut Batch) -> Result<()> {
    let call = |arg: &mut sys::pmskb_submit| {
        // SAFETY: a struct pmskb_submit, whose arrays the batch has just described.
        unsafe { set_one(socket, sys::PMSKB_PERSIST, arg) }
    };
    batch
        .submit_with(call)
        .map_err(|e| Error::new("cannot submit to the socket's store", e, error::SUBMIT))
}

/// Gives tokens back: `count` from `first` on.
pub fn release(socket: BorrowedFd<'_>, first: u32, count: u32) -> Result<()> {
    let range = sys::pmskb_token_range { first, count };
    // SAFETY: one struct pmskb_token_range.
    unsafe { set_one(socket, sys::PMSKB_RELEASE, &range) }
        .map_err(|e| Error::new("cannot release tokens", e, &[]))
}

/// # Safety
///
/// The option must take a `T`.
unsafe fn set_one<T>(socket: BorrowedFd<'_>, option: u32, value: &T) -> io::Result<()> {
    // SAFETY: `value` is valid for its size.
    unsafe {
        set(
            socket,
            sys::SOL_PMSKB as i32,
            option as i32,
            ptr::from_ref(value).cast(),
            size_of::<T>(),
        )
    }
}

/// # Safety
///
/// `value` must be valid for what the option does with it.
unsafe fn set(
    socket: BorrowedFd<'_>,
    level: i32,
    option: i32,
    value: *const c_void,
    len: usize,
) -> io::Result<()> {
    // SAFETY: as promised by the caller.
    let r = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            value,
            len as libc::socklen_t,
        )
    };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{net, os::fd::AsFd};

    fn pair() -> (net::TcpStream, net::TcpStream) {
        let l = net::TcpListener::bind("127.0.0.1:0").unwrap();
        let a = net::TcpStream::connect(l.local_addr().unwrap()).unwrap();
        (a, l.accept().unwrap().0)
    }

    #[test]
    fn a_socket_in_byte_mode_is_an_error_and_no_harm() {
        let (mut a, b) = pair();
        let mut buffer = RecvBuffer::new(4).unwrap();
        let e = buffer.recv(b.as_fd()).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
        io::Write::write_all(&mut a, b"bytes").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let e = buffer.recv(b.as_fd()).unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EFAULT));
        drop(a);
    }

    #[test]
    fn the_end_of_the_stream_is_an_empty_slice() {
        let (a, b) = pair();
        drop(a);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(RecvBuffer::new(4)
            .unwrap()
            .recv(b.as_fd())
            .unwrap()
            .is_empty());
    }

    #[test]
    fn descriptors_are_found_between_other_messages() {
        let mut buffer = RecvBuffer::new(8).unwrap();
        // SAFETY: a msghdr is valid when all zero.
        let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
        let base = buffer.control.as_mut_ptr();
        msg.msg_control = base.cast();
        msg.msg_controllen = (buffer.control.len() * 8) as _;
        let mut used = 0;
        // SAFETY: all messages fit the buffer, which has room for 8 of them.
        unsafe {
            let mut cmsg = libc::CMSG_FIRSTHDR(&msg);
            for (level, kind, token) in [
                (sys::SOL_PMSKB, 1, 5),
                (libc::SOL_SOCKET as u32, 1, 6),
                (sys::SOL_PMSKB, 1, 7),
            ] {
                let size = size_of::<sys::pmskb_desc>() as u32;
                (*cmsg).cmsg_level = level as i32;
                (*cmsg).cmsg_type = kind;
                (*cmsg).cmsg_len = libc::CMSG_LEN(size) as _;
                let desc = sys::pmskb_desc {
                    token,
                    ..Default::default()
                };
                ptr::write_unaligned(libc::CMSG_DATA(cmsg).cast(), desc);
                used += libc::CMSG_SPACE(size) as usize;
                cmsg = base.cast::<u8>().add(used).cast();
            }
            msg.msg_controllen = used as _;
            parse(&msg, &mut buffer.descs);
        }
        let tokens: Vec<u32> = buffer.descs.iter().map(Desc::token).collect();
        assert_eq!(tokens, [5, 7]);
    }

    #[test]
    fn attaching_without_the_module_says_so() {
        let (a, b) = pair();
        let e = attach(a.as_fd(), b.as_fd()).unwrap_err();
        assert_eq!(e.errno(), libc::ENOENT);
        assert!(e.to_string().contains("modprobe"), "{e}");
    }
}
