// SPDX-License-Identifier: GPL-2.0

//! Arrays of operations: put, delete, release.
//!
//! An array goes through four phases, each of which holds only what it needs:
//!
//! 1. *read*: operations, extents and keys are copied from user space, once;
//! 2. *resolve*: tokens become pieces of frames, under the lock of their socket; ranges of a
//!    buffer, after they were sealed. Each piece gets a hold of its own, so that what becomes of
//!    the token afterwards (another thread, `close`) cannot take the frame away;
//! 3. *commit*: puts and deletes are staged and committed under the store's lock, with two fences
//!    for the whole array;
//! 4. *finish*: tokens and frames of what succeeded are given back, seals and holds dropped,
//!    results copied out.
//!
//! No user memory is touched under the store's lock. `PMSKB_PERSIST` holds its socket's lock all
//! the time, as other calls on a socket do; `PMSKB_IOC_SUBMIT` locks one socket after the other in
//! phases 2 and 4 only. So the order is: a socket's lock, then the store's. Process context.

use crate::{
    attach::{self, Attached},
    bindings as ext,
    buffer::{Buffer, Sealed},
    frame::{Frame, FrameArea},
    pm::{self, csum::Sum, Pmem},
    region::Region,
    sock::{self, errno, OptVal, SocketFile, Transport},
    store::{Core, Store},
    token::Held,
    uapi::Plain,
};
use core::{mem::size_of, ops::Range};
use kernel::{
    bindings,
    ffi::c_int,
    fs::LocalFile,
    prelude::*,
    sync::Arc,
    uaccess::{UserPtr, UserSlice},
};

/// Most extents in one array, over all its operations: bounds the memory that a call takes.
const MAX_EXTENTS: usize = ext::PMSKB_MAX_EXTENTS as usize;
/// Flags that each operation may have.
const PUT_FLAGS: u32 = ext::PMSKB_OP_CREATE
    | ext::PMSKB_OP_REPLACE
    | ext::PMSKB_OP_KEEP
    | ext::PMSKB_OP_KEY_EXTENTS
    | ext::PMSKB_OP_IF_SEQ
    | ext::PMSKB_OP_CRC32C;
const DELETE_FLAGS: u32 = ext::PMSKB_OP_IF_SEQ;
/// Flags that an array may have.
const SUBMIT_FLAGS: u32 = ext::PMSKB_SUBMIT_ATOMIC | ext::PMSKB_SUBMIT_FAIL;

/// Whose tokens an array may name.
enum Caller<'a, 'b> {
    /// Those of one socket, which is locked: `setsockopt(PMSKB_PERSIST)`.
    Socket(&'a mut Attached<'b>),
    /// Those of the sockets that the operations name: `PMSKB_IOC_SUBMIT`, by ioctl or io_uring.
    Store,
}

/// What an operation does, checked, with all that it needs from user space.
enum Action {
    Put { mode: pm::PutMode, key: Key },
    Delete { key: Key },
    Release,
    Truncate(u64),
}

/// The key of an operation.
enum Key {
    None,
    /// From user memory, or gathered from several pieces: these of [`Array::keys`].
    Bytes(Range<usize>),
    /// In the packets: elements of `Op::exts` that come after the object's.
    Pieces,
}

/// An array on its way through the phases. What its operations refer to lies together, so that
/// however many they are, there are few allocations.
#[derive(Default)]
struct Array {
    ops: KVVec<Op>,
    /// Of each operation, the extents of the object, then those of the key.
    exts: KVVec<Plain<ext::pmskb_ext>>,
    /// What these are, resolved; each with a hold.
    pieces: KVVec<pm::Piece>,
    /// Bytes of keys.
    keys: KVVec<u8>,
}

/// The elements that a range names; it is one of theirs.
fn part<'a, T>(all: &'a [T], range: &Range<usize>) -> &'a [T] {
    all.get(range.clone()).unwrap_or_default()
}

/// One operation of an [`Array`].
struct Op {
    fd: i32,
    keep: bool,
    /// The record has a CRC32C, too.
    crc32c: bool,
    action: Action,
    /// Which of [`Array::exts`].
    exts: Range<usize>,
    /// How many of them, then of `pieces`, are the object's.
    object: usize,
    /// Which of [`Array::pieces`].
    pieces: Range<usize>,
    /// If they are of a buffer: nobody writes to it.
    sealed: Option<Sealed>,
    /// The socket that `fd` names, as soon as it was asked for: it may name another one later, whose
    /// tokens have the same numbers.
    socket: Option<SocketFile>,
    meta: pm::Meta,
    if_seq: Option<u64>,
    result: Plain<ext::pmskb_result>,
}

/// `PMSKB_PERSIST` on an attached socket, which is locked. Errors as [`submit`].
pub(crate) fn persist(socket: &mut Attached<'_>, value: &OptVal) -> Result<c_int> {
    let header = value.read::<Plain<ext::pmskb_submit>>()?.0;
    let store = socket.store().clone();
    submit(&store, Caller::Socket(socket), header)?;
    Ok(0)
}

/// `PMSKB_IOC_SUBMIT` on a store, with the header at `arg`. Errors as [`submit`]; never `EAGAIN`,
/// upon which io_uring would carry it out again.
pub(crate) fn ioctl(store: &Arc<Store>, arg: UserPtr) -> Result {
    let size = size_of::<ext::pmskb_submit>();
    let header = UserSlice::new(arg, size).reader().read::<Plain<_>>()?.0;
    submit(store, Caller::Store, header)
}

/// Carries out an array of operations. The errno is for the whole array, and then nothing was
/// done, unless it is the copying out of results that failed (`EFAULT`), or that of an operation,
/// which `PMSKB_SUBMIT_FAIL` asks for.
///
/// `EINVAL` bad header, `E2BIG` too many operations, `EFAULT` bad array, `ENOMEM`, `EIO` store
/// gone. Each operation's own errno is in its result.
fn submit(store: &Arc<Store>, mut caller: Caller<'_, '_>, header: ext::pmskb_submit) -> Result {
    let atomic = header.flags & ext::PMSKB_SUBMIT_ATOMIC != 0;
    if header.nr == 0 || header.flags & !SUBMIT_FLAGS != 0 || header.reserved != 0 {
        return Err(EINVAL);
    }
    if header.nr > ext::PMSKB_MAX_OPS {
        return Err(E2BIG);
    }
    let nr = header.nr as usize;
    // Whoever cannot take the results shall hear so before anything is done.
    clear_results(header.results, nr)?;
    store.submits.add(1);

    let mut array = Array::read(&caller, &header, nr)?;
    let Array {
        ops, exts, pieces, ..
    } = &mut array;
    let mut left = MAX_EXTENTS;
    for op in ops.iter_mut() {
        let first = pieces.len();
        if op.result.0.res == 0 {
            let resolved = resolve(store, &mut caller, op, exts, pieces, &mut left);
            op.fail_if(resolved);
        }
        op.pieces = first..pieces.len();
    }
    if atomic {
        check_releases(store, &mut caller, ops, exts);
    }
    commit(store, &mut array, atomic);
    for op in array.ops.iter_mut() {
        finish(store, &mut caller, op, &array.exts, atomic);
    }
    for piece in &array.pieces {
        unhold(store.frames(), piece);
    }
    let ops = &array.ops;
    // Their space is back when the call returns, unless a signal ends it: then upkeep goes on.
    let truncated = |op: &Op| matches!(op.action, Action::Truncate(_)) && !op.failed();
    if ops.iter().any(truncated) {
        // Done they are, whatever this answers. With a socket locked, not for too long.
        let _ = store.drain(matches!(caller, Caller::Store));
    }
    store.upkeep();
    write_results(header.results, ops)?;
    if header.flags & ext::PMSKB_SUBMIT_FAIL != 0 {
        return first_failure(ops);
    }
    Ok(())
}

/// The error of the first operation that failed; of an array that is all or nothing, of the one
/// that took the others with it. `EAGAIN` is `EBUSY`: to io_uring it would mean that nothing was
/// done yet.
fn first_failure(ops: &[Op]) -> Result {
    let cancelled = errno(bindings::ECANCELED);
    let failures = || {
        let failed = ops.iter().filter(|op| op.failed());
        failed.map(|op| Error::from_errno(op.result.0.res as c_int))
    };
    let first = failures().find(|error| *error != cancelled);
    match first.or_else(|| failures().next()) {
        None => Ok(()),
        Some(error) if error == EAGAIN => Err(EBUSY),
        Some(error) => Err(error),
    }
}

/// A release of an array that is all or nothing must not be what fails after the rest was done.
fn check_releases(
    store: &Arc<Store>,
    caller: &mut Caller<'_, '_>,
    ops: &mut [Op],
    exts: &[Plain<ext::pmskb_ext>],
) {
    for op in ops.iter_mut() {
        if matches!(op.action, Action::Release) && !op.failed() {
            let exts = part(exts, &op.exts);
            let checked = with_socket(store, caller, op.fd, &mut op.socket, |socket| {
                exts.iter()
                    .try_for_each(|ext| socket.get(ext.0.token).map(|_| ()))
            });
            op.fail_if(checked);
        }
    }
}

fn clear_results(ptr: u64, nr: usize) -> Result {
    let size = nr * size_of::<ext::pmskb_result>();
    let mut writer = UserSlice::new(UserPtr::from_addr(ptr as usize), size).writer();
    for _ in 0..nr {
        writer.write(&Plain(ext::pmskb_result::default()))?;
    }
    Ok(())
}

fn write_results(ptr: u64, ops: &[Op]) -> Result {
    let size = ops.len() * size_of::<ext::pmskb_result>();
    let mut writer = UserSlice::new(UserPtr::from_addr(ptr as usize), size).writer();
    for op in ops {
        writer.write(&op.result)?;
    }
    Ok(())
}

impl Array {
    /// Phase 1. Fails if the array cannot be read; what is wrong with one operation is its result.
    fn read(caller: &Caller<'_, '_>, header: &ext::pmskb_submit, nr: usize) -> Result<Self> {
        let size = nr * size_of::<ext::pmskb_op>();
        let mut reader = UserSlice::new(UserPtr::from_addr(header.ops as usize), size).reader();
        let mut array = Array::default();
        array.ops.reserve(nr, GFP_KERNEL_ACCOUNT)?;
        let mut left = MAX_EXTENTS;
        for _ in 0..nr {
            let raw = reader.read::<Plain<ext::pmskb_op>>()?.0;
            let mut op = Op::new(raw.fd, Action::Release);
            op.keep = u32::from(raw.flags) & ext::PMSKB_OP_KEEP != 0;
            op.crc32c = u32::from(raw.flags) & ext::PMSKB_OP_CRC32C != 0;
            let first = array.exts.len();
            let read = match caller {
                Caller::Socket(_) if raw.fd != -1 => Err(EINVAL),
                _ => op.read(&raw, &mut array.exts, &mut array.keys, &mut left),
            };
            op.exts = first..array.exts.len();
            match read {
                Err(error) if error == ENOMEM => return Err(error),
                read => op.fail_if(read),
            }
            array.ops.push(op, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(array)
    }
}

impl Op {
    fn new(fd: i32, action: Action) -> Self {
        Self {
            fd,
            keep: false,
            crc32c: false,
            action,
            exts: 0..0,
            object: 0,
            pieces: 0..0,
            sealed: None,
            socket: None,
            meta: pm::Meta::default(),
            if_seq: None,
            result: Plain::default(),
        }
    }

    /// The operation has failed, if `result` is an error.
    fn fail_if<T>(&mut self, result: Result<T>) {
        if let Err(error) = result {
            self.result = Plain(ext::pmskb_result {
                res: error.to_errno().into(),
                ..Default::default()
            });
        }
    }

    fn failed(&self) -> bool {
        self.result.0.res < 0
    }

    /// Its pieces: those of the object, those of the key.
    fn split<'a>(&self, pieces: &'a [pm::Piece]) -> (&'a [pm::Piece], &'a [pm::Piece]) {
        let pieces = part(pieces, &self.pieces);
        pieces.split_at_checked(self.object).unwrap_or_default()
    }

    /// Checks the operation and adds what it points to.
    fn read(
        &mut self,
        raw: &ext::pmskb_op,
        exts: &mut KVVec<Plain<ext::pmskb_ext>>,
        keys: &mut KVVec<u8>,
        left: &mut usize,
    ) -> Result {
        let flags = u32::from(raw.flags);
        if raw.reserved.iter().any(|word| *word != 0) {
            return Err(EINVAL);
        }
        let opcode = u32::from(raw.opcode);
        let allowed = match opcode {
            ext::pmskb_opcode_PMSKB_OP_PUT => PUT_FLAGS,
            ext::pmskb_opcode_PMSKB_OP_DELETE => DELETE_FLAGS,
            ext::pmskb_opcode_PMSKB_OP_RELEASE => 0,
            ext::pmskb_opcode_PMSKB_OP_TRUNCATE => 0,
            _ => return Err(EINVAL),
        };
        if flags & !allowed != 0 {
            return Err(EINVAL);
        }
        let truncate = opcode == ext::pmskb_opcode_PMSKB_OP_TRUNCATE;
        if flags & ext::PMSKB_OP_IF_SEQ != 0 {
            if raw.key_len == 0 {
                return Err(EINVAL);
            }
            self.if_seq = Some(raw.seq);
        } else if raw.seq != 0 && !truncate {
            return Err(EINVAL);
        }
        let first = exts.len();
        read_exts(exts, raw.extents, raw.nr_extents, left)?;
        let object = first..exts.len();
        self.object = object.len();
        self.action = match opcode {
            ext::pmskb_opcode_PMSKB_OP_PUT => {
                const BOTH: u32 = ext::PMSKB_OP_CREATE | ext::PMSKB_OP_REPLACE;
                let mode = match flags & BOTH {
                    ext::PMSKB_OP_CREATE => pm::PutMode::Create,
                    ext::PMSKB_OP_REPLACE => pm::PutMode::Replace,
                    BOTH => return Err(EINVAL),
                    _ => pm::PutMode::Upsert,
                };
                let key = read_key(raw, flags, exts, keys, left)?;
                if matches!(key, Key::None) && mode != pm::PutMode::Upsert {
                    return Err(EINVAL);
                }
                if bytes_of(part(exts, &object)) > pm::MAX_OBJECT {
                    return Err(EFBIG);
                }
                Action::Put { mode, key }
            }
            ext::pmskb_opcode_PMSKB_OP_DELETE => {
                if raw.nr_extents != 0 {
                    return Err(EINVAL);
                }
                match read_key(raw, flags, exts, keys, left)? {
                    Key::None => return Err(EINVAL),
                    key => Action::Delete { key },
                }
            }
            ext::pmskb_opcode_PMSKB_OP_TRUNCATE => {
                if raw.key_len != 0 || raw.nr_extents != 0 {
                    return Err(EINVAL);
                }
                Action::Truncate(raw.seq)
            }
            _ => {
                if raw.key_len != 0 || raw.nr_extents == 0 {
                    return Err(EINVAL);
                }
                Action::Release
            }
        };
        let release = matches!(self.action, Action::Release);
        for ext in exts.iter().skip(first).map(|ext| &ext.0) {
            if ext.reserved != 0 {
                return Err(EINVAL);
            }
            // Only its token counts for a release; a part of nothing is no part.
            if release != (ext.len == 0) || (release && ext.offset != 0) {
                return Err(EINVAL);
            }
        }
        Ok(())
    }
}

/// Bytes of extents.
fn bytes_of(exts: &[Plain<ext::pmskb_ext>]) -> u64 {
    exts.iter().map(|ext| u64::from(ext.0.len)).sum()
}

fn read_exts(
    exts: &mut KVVec<Plain<ext::pmskb_ext>>,
    ptr: u64,
    nr: u32,
    left: &mut usize,
) -> Result {
    let nr = nr as usize;
    if nr > ext::PMSKB_MAX_EXTENTS as usize {
        return Err(E2BIG);
    }
    *left = left.checked_sub(nr).ok_or(E2BIG)?;
    let size = nr * size_of::<ext::pmskb_ext>();
    let mut reader = UserSlice::new(UserPtr::from_addr(ptr as usize), size).reader();
    exts.reserve(nr, GFP_KERNEL_ACCOUNT)?;
    for _ in 0..nr {
        exts.push(reader.read()?, GFP_KERNEL_ACCOUNT)?;
    }
    Ok(())
}

fn read_key(
    raw: &ext::pmskb_op,
    flags: u32,
    exts: &mut KVVec<Plain<ext::pmskb_ext>>,
    keys: &mut KVVec<u8>,
    left: &mut usize,
) -> Result<Key> {
    let in_packet = flags & ext::PMSKB_OP_KEY_EXTENTS != 0;
    let len = raw.key_len;
    if len == 0 {
        return if in_packet {
            Err(EINVAL)
        } else {
            Ok(Key::None)
        };
    }
    // More pieces than bytes cannot be: an extent has at least one.
    if len > ext::PMSKB_MAX_KEY {
        return Err(errno(bindings::ENAMETOOLONG));
    }
    if in_packet {
        let first = exts.len();
        read_exts(exts, raw.key, len, left)?;
        if bytes_of(part(exts, &(first..exts.len()))) > u64::from(ext::PMSKB_MAX_KEY) {
            return Err(errno(bindings::ENAMETOOLONG));
        }
        return Ok(Key::Pieces);
    }
    let first = keys.len();
    keys.resize(first + len as usize, 0, GFP_KERNEL_ACCOUNT)?;
    let to = keys.get_mut(first..).ok_or(EINVAL)?;
    let slice = UserSlice::new(UserPtr::from_addr(raw.key as usize), len as usize);
    slice.reader().read_slice(to)?;
    Ok(Key::Bytes(first..keys.len()))
}

/// Phase 2: what the extents are, with a hold on each of their frames. `left` is how many frames
/// of buffers the array may still name.
fn resolve(
    store: &Arc<Store>,
    caller: &mut Caller<'_, '_>,
    op: &mut Op,
    exts: &[Plain<ext::pmskb_ext>],
    pieces: &mut KVVec<pm::Piece>,
    left: &mut usize,
) -> Result {
    let exts = part(exts, &op.exts);
    if exts.is_empty() {
        return Ok(());
    }
    if matches!(caller, Caller::Store) {
        if let Some((buffer, file)) = Buffer::of_fd(op.fd) {
            return resolve_buffer(store, &buffer, &file, op, exts, pieces, left);
        }
    }
    if matches!(op.action, Action::Release) {
        return Ok(());
    }
    let before = pieces.len();
    pieces.reserve(exts.len(), GFP_KERNEL_ACCOUNT)?;
    let Op {
        fd,
        object,
        meta,
        crc32c,
        socket,
        ..
    } = op;
    with_socket(store, caller, *fd, socket, |socket| {
        *crc32c |= socket.crc32c();
        let udp = socket.transport() == Transport::Udp;
        // Of several datagrams the first one's.
        let first = exts.first().map_or(0, |ext| ext.0.token);
        meta.flow = flow(&socket.flow(first), udp);
        for (nr, ext) in exts.iter().map(|ext| &ext.0).enumerate() {
            let held = socket.get(ext.token)?;
            let piece = piece(&held, ext.offset, ext.len)?;
            if nr == 0 && !udp {
                meta.tcp_seq = held.note.seq.wrapping_add(ext.offset);
            }
            if nr < *object {
                came_with(meta, &held);
            }
            socket.store().frames().hold(held.frame)?;
            // Room was reserved above.
            pieces.push(piece, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(())
    })?;
    no_overlap(pieces, before, op.object)
}

/// `len` bytes from `off` of what a token holds, as a part of an object. `EINVAL` if there are fewer.
fn piece(held: &Held, off: u32, len: u32) -> Result<pm::Piece> {
    let note = &held.note;
    let after = off
        .checked_add(len)
        .and_then(|end| u32::from(note.len).checked_sub(end))
        .ok_or(EINVAL)?;
    Ok(pm::Piece {
        off: held.frame.off() + u64::from(note.offset) + u64::from(off),
        len,
        packet: pm::Packet {
            seq: note.seq.wrapping_sub(note.pkt_off),
            time: note.time,
            len: note.pkt_len,
            sum: Sum::new(note.csum),
            kind: csum_kind(note.kind),
        },
        at: note.pkt_off.saturating_add(off),
        before: off,
        after,
        crc: note.crc.filter(|_| len == u32::from(note.len)),
    })
}

/// What an object's record says of the packets that it came in.
fn came_with(meta: &mut pm::Meta, held: &Held) {
    meta.copied |= held.note.copied;
    // An object is there when its last packet has come.
    if held.note.time >= meta.time {
        meta.time = held.note.time;
        meta.time_source = time_source(held.note.source);
    }
}

/// [`resolve`] of extents that are ranges of a buffer, which nobody can write to from then on.
fn resolve_buffer(
    store: &Arc<Store>,
    buffer: &Arc<Buffer>,
    file: &LocalFile,
    op: &mut Op,
    exts: &[Plain<ext::pmskb_ext>],
    pieces: &mut KVVec<pm::Piece>,
    left: &mut usize,
) -> Result {
    if matches!(op.action, Action::Release) || exts.iter().any(|ext| ext.0.token != 0) {
        return Err(EINVAL);
    }
    if !Arc::ptr_eq(buffer.store(), store) {
        return Err(errno(bindings::EXDEV));
    }
    let ranges = exts.iter().map(|ext| (ext.0.offset, ext.0.len));
    let sealed = buffer.seal(file, ranges, op.keep, *left);
    if matches!(&sealed, Err(e) if *e == E2BIG) {
        // Not so many once more with the next operation.
        *left = 0;
    }
    let sealed = &*op.sealed.insert(sealed?);
    let before = pieces.len();
    let mut object = 0;
    for (nr, ext) in exts.iter().map(|ext| &ext.0).enumerate() {
        sealed.places(ext.offset, ext.len, |frame, off, len| {
            *left = left.checked_sub(1).ok_or(E2BIG)?;
            let piece = pm::Piece {
                off,
                len,
                // There is no sum yet, so that the bytes are read for it.
                packet: pm::Packet {
                    seq: 0,
                    time: 0,
                    len: 0,
                    sum: Sum::ZERO,
                    kind: pm::CsumKind::None,
                },
                at: 0,
                before: 0,
                after: 0,
                crc: None,
            };
            pieces.reserve(1, GFP_KERNEL_ACCOUNT)?;
            store.frames().hold(frame)?;
            // Room was reserved above.
            pieces.push(piece, GFP_KERNEL_ACCOUNT)?;
            Ok(())
        })?;
        if nr + 1 == op.object {
            object = pieces.len() - before;
        }
    }
    // From extents to pieces: one may lie in several frames.
    op.object = object;
    no_overlap(pieces, before, object)
}

/// The flow of a record, from that of a socket or a datagram.
fn flow(flow: &sock::Flow, udp: bool) -> Option<pm::Flow> {
    let v4 = |addr: &[u8; 16]| addr.first_chunk().copied();
    let addrs = match flow.version {
        4 => pm::Addrs::V4 {
            remote: v4(&flow.peer)?,
            local: v4(&flow.local)?,
        },
        6 => pm::Addrs::V6 {
            remote: flow.peer,
            local: flow.local,
        },
        _ => return None,
    };
    Some(pm::Flow {
        addrs,
        remote_port: flow.peer_port,
        local_port: flow.local_port,
        udp,
    })
}

fn csum_kind(kind: u8) -> pm::CsumKind {
    match u32::from(kind) {
        ext::pmskb_csum_kind_PMSKB_CSUM_DERIVED => pm::CsumKind::Derived,
        ext::pmskb_csum_kind_PMSKB_CSUM_HARDWARE => pm::CsumKind::Hardware,
        ext::pmskb_csum_kind_PMSKB_CSUM_COMPUTED => pm::CsumKind::Computed,
        _ => pm::CsumKind::None,
    }
}

fn time_source(source: u8) -> pm::TimeSource {
    match u32::from(source) {
        ext::pmskb_time_source_PMSKB_TIME_HARDWARE => pm::TimeSource::Hardware,
        ext::pmskb_time_source_PMSKB_TIME_SOFTWARE => pm::TimeSource::Software,
        ext::pmskb_time_source_PMSKB_TIME_PLACEMENT => pm::TimeSource::Placement,
        _ => pm::TimeSource::None,
    }
}

fn unhold(frames: &FrameArea, piece: &pm::Piece) {
    if let Some(frame) = Frame::of(piece.off) {
        // It was held by `hold`, so it cannot fail.
        let _ = frames.unhold(frame);
    }
}

/// `EINVAL` if any two of `count` pieces have bytes in common.
fn no_overlap(pieces: &[pm::Piece], first: usize, count: usize) -> Result {
    let pieces = part(pieces, &(first..first + count));
    let end = |piece: &pm::Piece| piece.off.saturating_add(u64::from(piece.len));
    let in_order = |pair: &[pm::Piece]| match pair {
        [a, b] => end(a) <= b.off,
        _ => true,
    };
    if pieces.windows(2).all(in_order) {
        return Ok(());
    }
    let mut sorted = KVVec::with_capacity(pieces.len(), GFP_KERNEL_ACCOUNT)?;
    sorted.extend_from_slice(pieces, GFP_KERNEL_ACCOUNT)?;
    sorted.sort_unstable_by_key(|piece| piece.off);
    if sorted.windows(2).all(in_order) {
        Ok(())
    } else {
        Err(EINVAL)
    }
}

/// Phase 3. What is the store's error is that of every operation that was not refused before. If
/// they are to be atomic, one that fails takes the others with it.
fn commit(store: &Store, array: &mut Array, atomic: bool) {
    let Array {
        ops, pieces, keys, ..
    } = array;
    let stages = |op: &&mut Op| !op.failed() && !matches!(op.action, Action::Release);
    let now = crate::host::now();
    let mut any = false;
    for op in ops.iter_mut().filter(stages) {
        let composed = compose(store, op, pieces, keys, now);
        any |= composed.is_ok();
        if atomic && matches!(op.action, Action::Truncate(_)) {
            op.fail_if(Err::<(), _>(EINVAL));
        }
        op.fail_if(composed);
    }
    if cancelled(ops, atomic) || !any {
        return;
    }
    let mut extents = KVVec::new();
    let committed = store.core().and_then(|mut core| {
        let core = core.get()?;
        if atomic {
            core.begin_atomic().map_err(crate::errno)?;
        }
        for op in ops.iter_mut().filter(stages) {
            let staged = stage(core, op, pieces, keys, &mut extents);
            op.fail_if(staged);
            if atomic && op.failed() {
                break;
            }
        }
        if cancelled(ops, atomic) {
            core.abort();
            return Ok(());
        }
        core.commit().map_err(crate::errno)
    });
    if let Err(error) = committed {
        // Whatever a result says so far, it is not durable.
        for op in ops.iter_mut().filter(stages) {
            // But it may be there after the next recovery, with its sum: not to be written to.
            if let Some(sealed) = op.sealed.take() {
                sealed.finish();
            }
            op.fail_if(Err::<(), _>(error));
        }
        // The releases of an array that is to be atomic fail with the rest.
        cancelled(ops, atomic);
    }
}

/// Whether an array that is to be atomic has failed: then all of it has.
fn cancelled(ops: &mut [Op], atomic: bool) -> bool {
    if !atomic || !ops.iter().any(Op::failed) {
        return false;
    }
    for op in ops.iter_mut().filter(|op| !op.failed()) {
        op.fail_if(Err::<(), _>(errno(bindings::ECANCELED)));
    }
    true
}

/// The checksum and the rest of the metadata that depends on the object's bytes.
fn compose(
    store: &Store,
    op: &mut Op,
    pieces: &[pm::Piece],
    keys: &mut KVVec<u8>,
    now: u64,
) -> Result {
    let _inside = store.enter()?;
    let region: &Region = store.region();
    let (object, of_key) = op.split(pieces);
    if let Action::Put { key, .. } | Action::Delete { key } = &mut op.action {
        if matches!(key, Key::Pieces) {
            if let Some(bytes) = gather(region, of_key, keys)? {
                *key = Key::Bytes(bytes);
            }
        }
    }
    let composed = pm::compose(object, op.crc32c || store.crc32c(), |off, len, with_crc| {
        look(region, off, len, with_crc)
    })
    .map_err(crate::errno)?;
    let read = composed.read.saturating_add(composed.crc_read);
    store.counters.computed_bytes.add(read);
    op.meta.csum = composed.sum;
    op.meta.csum_kind = composed.kind;
    op.meta.payload_crc = composed.crc;
    if op.meta.time_source == pm::TimeSource::None {
        op.meta.time = now;
        op.meta.time_source = pm::TimeSource::Placement;
    }
    Ok(())
}

/// Adds the bytes of a key, unless they lie together and can stay where they are.
fn gather(
    region: &impl Pmem,
    pieces: &[pm::Piece],
    keys: &mut KVVec<u8>,
) -> Result<Option<Range<usize>>> {
    if let [_] = pieces {
        return Ok(None);
    }
    let first = keys.len();
    for piece in pieces {
        let at = keys.len();
        keys.resize(at + piece.len as usize, 0, GFP_KERNEL_ACCOUNT)?;
        let to = keys.get_mut(at..).ok_or(EINVAL)?;
        region.read(piece.off, to).map_err(crate::errno)?;
    }
    Ok(Some(first..keys.len()))
}

/// Stages one operation. `extents` is room for its extents.
fn stage(
    core: &mut Core,
    op: &mut Op,
    pieces: &[pm::Piece],
    keys: &[u8],
    extents: &mut KVVec<pm::Extent>,
) -> Result {
    let extent = |piece: &pm::Piece| pm::Extent::new(piece.off, piece.len);
    let (object, of_key) = op.split(pieces);
    let in_packet = of_key.first().map(extent);
    match &op.action {
        Action::Put { mode, key } => {
            extents.clear();
            for piece in object {
                extents.push(extent(piece), GFP_KERNEL_ACCOUNT)?;
            }
            let key = match (key, in_packet) {
                (Key::None, _) => pm::Key::None,
                (Key::Bytes(bytes), _) => pm::Key::Bytes(part(keys, bytes)),
                (Key::Pieces, Some(extent)) => pm::Key::Extent(extent),
                (Key::Pieces, None) => return Err(EINVAL),
            };
            let outcome = core
                .put(&pm::PutArgs {
                    key,
                    extents,
                    meta: op.meta,
                    mode: *mode,
                    if_seq: op.if_seq,
                })
                .map_err(crate::errno)?;
            let mut flags = 0;
            if op.meta.copied {
                flags |= ext::PMSKB_RES_COPIED;
            }
            if outcome.replaced {
                flags |= ext::PMSKB_RES_REPLACED;
            }
            op.result = Plain(ext::pmskb_result {
                res: i64::try_from(outcome.seq).map_err(|_| EOVERFLOW)?,
                flags,
                csum: op.meta.csum.get().to_be(),
                csum_kind: op.meta.csum_kind as u8,
                ..Default::default()
            });
        }
        Action::Delete { key } => {
            let mut buf;
            let bytes: &[u8] = match (key, in_packet) {
                (Key::Bytes(bytes), _) => part(keys, bytes),
                (Key::Pieces, Some(extent)) => {
                    buf = KVec::from_elem(0u8, extent.len as usize, GFP_KERNEL_ACCOUNT)?;
                    core.pm().read(extent.off, &mut buf).map_err(crate::errno)?;
                    &buf
                }
                _ => return Err(EINVAL),
            };
            let seq = core.delete(bytes, op.if_seq).map_err(crate::errno)?;
            op.result.0.res = i64::try_from(seq).map_err(|_| EOVERFLOW)?;
        }
        Action::Truncate(seq) => {
            core.truncate(*seq).map_err(crate::errno)?;
            let upto = core.stats().trunc_seq;
            op.result.0.res = i64::try_from(upto).map_err(|_| EOVERFLOW)?;
        }
        Action::Release => {}
    }
    Ok(())
}

/// Phase 4: the tokens of a put that succeeded, and those of a release, go. In an array that is all
/// or nothing, and was done, a release gives back what is still held: [`check_releases`] saw its
/// tokens, and another operation may name them too.
fn finish(
    store: &Arc<Store>,
    caller: &mut Caller<'_, '_>,
    op: &mut Op,
    exts: &[Plain<ext::pmskb_ext>],
    atomic: bool,
) {
    let exts = part(exts, &op.exts);
    let release = matches!(op.action, Action::Release);
    if let Some(sealed) = op.sealed.take() {
        if !op.failed() {
            sealed.finish();
        }
    } else if !op.failed() && !exts.is_empty() && (release || !op.keep) {
        let mut released = 0;
        let done = with_socket(store, caller, op.fd, &mut op.socket, |socket| {
            if release && !atomic {
                // All or none, so that a wrong token does no harm.
                for ext in exts {
                    socket.get(ext.0.token)?;
                }
            }
            for ext in exts {
                // An operation may name a token several times; it goes once.
                released += i64::from(socket.release(ext.0.token).is_ok());
            }
            Ok(())
        });
        if release {
            op.result.0.res = released;
            if !atomic {
                op.fail_if(done);
            }
        }
    }
}

/// Calls `then` with the socket that an operation names, locked. `EXDEV` if it is attached to
/// another store, else the errors of [`attach::with_attached`].
fn with_socket<T>(
    store: &Arc<Store>,
    caller: &mut Caller<'_, '_>,
    fd: i32,
    file: &mut Option<SocketFile>,
    then: impl FnOnce(&mut Attached<'_>) -> Result<T>,
) -> Result<T> {
    if let Caller::Socket(socket) = caller {
        return then(socket);
    }
    let file = match file {
        Some(file) => file,
        none => none.insert(SocketFile::get(fd)?),
    };
    attach::with_attached(file, |socket| {
        if !Arc::ptr_eq(socket.store(), store) {
            return Err(errno(bindings::EXDEV));
        }
        then(socket)
    })
}

/// Records without a key of what a socket has received, in order, for auto-persist: of TCP one a
/// packet, of UDP one a datagram. Process context, under the socket's lock.
pub(crate) struct Log<'a> {
    store: &'a Arc<Store>,
    crc32c: bool,
    /// Of a TCP socket; a datagram has its own.
    flow: Option<pm::Flow>,
    /// What is added is of the last datagram.
    datagrams: bool,
    array: Array,
}

/// What a [`Log`] has made durable, from the first one added.
#[derive(Clone, Copy, Default)]
pub(crate) struct Logged {
    /// Records.
    pub(crate) records: usize,
    /// Their bytes.
    pub(crate) bytes: u32,
}

impl<'a> Log<'a> {
    /// Records that are committed together, at most.
    const BATCH: usize = 128;

    fn new(store: &'a Arc<Store>, crc32c: bool, flow: Option<pm::Flow>, datagrams: bool) -> Self {
        Self {
            store,
            crc32c,
            flow,
            datagrams,
            array: Array::default(),
        }
    }

    /// None yet, of packets of a TCP socket.
    pub(crate) fn of_stream(store: &'a Arc<Store>, from: &sock::Flow, crc32c: bool) -> Self {
        Self::new(store, crc32c, flow(from, false), false)
    }

    /// None yet, of datagrams.
    pub(crate) fn of_datagrams(store: &'a Arc<Store>, crc32c: bool) -> Self {
        Self::new(store, crc32c, None, true)
    }

    /// [`Self::add`] no more, and commit.
    pub(crate) fn is_full(&self) -> bool {
        self.len() >= Self::BATCH
    }

    /// How many records there are.
    pub(crate) fn len(&self) -> usize {
        self.array.ops.len()
    }

    /// Begins the record of a datagram; with its stamp, if it has no bytes that bring theirs.
    /// `ENOMEM`.
    pub(crate) fn datagram(&mut self, from: &sock::Flow, stamp: Option<(u64, u8)>) -> Result {
        let mut op = self.op();
        op.meta.flow = flow(from, true);
        if let Some((time, source)) = stamp {
            op.meta.time = time;
            op.meta.time_source = time_source(source);
        }
        Ok(self.array.ops.push(op, GFP_KERNEL_ACCOUNT)?)
    }

    /// Adds the bytes that come next, and takes over their hold. `ENOMEM`.
    pub(crate) fn add(&mut self, held: Held) -> Result {
        let added = self.append(&held);
        if added.is_err() {
            // It was held, so it cannot fail.
            let _ = self.store.frames().unhold(held.frame);
        }
        added
    }

    /// Keeps the first `len` records.
    pub(crate) fn truncate(&mut self, len: usize) {
        let Array { ops, pieces, .. } = &mut self.array;
        let Some(first) = ops.get(len).map(|op| op.pieces.start) else {
            return;
        };
        for piece in pieces.iter().skip(first) {
            unhold(self.store.frames(), piece);
        }
        pieces.truncate(first);
        ops.truncate(len);
    }

    fn op(&self) -> Op {
        let put = Action::Put {
            mode: pm::PutMode::Upsert,
            key: Key::None,
        };
        let mut op = Op::new(-1, put);
        op.crc32c = self.crc32c;
        op.meta.flow = self.flow;
        let end = self.array.pieces.len();
        op.pieces = end..end;
        op
    }

    fn append(&mut self, held: &Held) -> Result {
        let piece = piece(held, 0, held.note.len.into())?;
        let goes_on = |last: &pm::Piece| {
            last.packet == piece.packet && last.at.checked_add(last.len) == Some(piece.at)
        };
        let Array { ops, pieces, .. } = &mut self.array;
        let goes_on = self.datagrams || pieces.last().is_some_and(goes_on);
        if !goes_on || ops.is_empty() {
            let mut op = self.op();
            op.meta.tcp_seq = held.note.seq;
            self.array.pieces.reserve(1, GFP_KERNEL_ACCOUNT)?;
            self.array.ops.push(op, GFP_KERNEL_ACCOUNT)?;
        }
        let Array { ops, pieces, .. } = &mut self.array;
        pieces.push(piece, GFP_KERNEL_ACCOUNT)?;
        if let Some(op) = ops.last_mut() {
            op.pieces.end = pieces.len();
            op.object = op.pieces.len();
            came_with(&mut op.meta, held);
        }
        Ok(())
    }

    /// Makes the records: how many of them are durable now; the error, if not all.
    pub(crate) fn commit(mut self) -> (Logged, Result) {
        let store = self.store;
        let Array {
            ops, pieces, keys, ..
        } = &mut self.array;
        if ops.is_empty() {
            return (Logged::default(), Ok(()));
        }
        let now = crate::host::now();
        // What follows one that cannot be made shall not be there, either.
        let mut result = Ok(());
        let mut composed = 0;
        for op in ops.iter_mut() {
            result = compose(store, op, pieces, keys, now);
            if result.is_err() {
                break;
            }
            composed += 1;
        }
        let mut records = 0;
        let mut extents = KVVec::new();
        let committed = store.core().and_then(|mut core| {
            let core = core.get()?;
            while let Some(op) = ops.get_mut(records).filter(|_| records < composed) {
                match stage(core, op, pieces, keys, &mut extents) {
                    Ok(()) => records += 1,
                    Err(error) if error == ENOSPC && records == 0 && composed > 1 => {
                        // The frames that the first one's record lacks may be those to which the
                        // bytes of the later ones were copied: these come another time.
                        let first = op.pieces.end;
                        for piece in pieces.iter().skip(first) {
                            unhold(store.frames(), piece);
                        }
                        pieces.truncate(first);
                        ops.truncate(1);
                        composed = 1;
                    }
                    Err(error) => {
                        result = Err(error);
                        break;
                    }
                }
            }
            core.commit().map_err(crate::errno)
        });
        if let Err(error) = committed {
            return (Logged::default(), Err(error));
        }
        let made = ops.get(records).map_or(pieces.len(), |op| op.pieces.start);
        let pieces = pieces.iter().take(made);
        let bytes = pieces.fold(0u32, |bytes, piece| bytes.wrapping_add(piece.len));
        store.submits.add(1);
        (Logged { records, bytes }, result)
    }
}

impl Drop for Log<'_> {
    fn drop(&mut self) {
        for piece in &self.array.pieces {
            unhold(self.store.frames(), piece);
        }
        self.store.upkeep();
    }
}

/// The Internet checksum of `len` bytes of the region, and their CRC32C if that is wanted; survives
/// media errors.
fn look(region: &Region, off: u64, len: u32, with_crc: bool) -> pm::Result<(Sum, u32)> {
    let mut buf = [0u8; 512];
    let (mut sum, mut crc) = (Sum::ZERO, 0);
    let mut at = 0u64;
    while at < u64::from(len) {
        let now = (u64::from(len) - at).min(buf.len() as u64);
        let part = buf.get_mut(..now as usize).ok_or(pm::Error::Invalid)?;
        region.read(off.saturating_add(at), part)?;
        sum = sum.then(at, Sum::of(part));
        if with_crc {
            crc = region.crc32c(crc, part);
        }
        at += now;
    }
    Ok((sum, crc))
}
