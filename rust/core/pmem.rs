// SPDX-License-Identifier: GPL-2.0

//! What the core needs of persistent memory.

use super::{Error, Result, LINE_SIZE};
use core::ops::DerefMut;
use core::sync::atomic::{fence, Ordering};

/// Memory that the host allocates for the core, in 64-bit words.
///
/// A `Vec<u64>` on a host, a `KVVec<u64>` in the kernel.
pub trait Buf: DerefMut<Target = [u64]> {}
impl<T: DerefMut<Target = [u64]>> Buf for T {}

/// A region of persistent memory.
///
/// Offsets count bytes from the start of the region. An access that is not
/// wholly inside the region fails with [`Error::Invalid`], one that the media
/// refuses with [`Error::Io`]; none panics.
///
/// Nothing is durable until [`flush`](Pmem::flush) of its lines and then
/// [`fence`](Pmem::fence).
pub trait Pmem {
    /// Bytes of the region.
    fn len(&self) -> u64;

    /// Whether the region has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes out of the region. Must survive machine checks ([`Error::Io`]).
    fn read(&self, off: u64, to: &mut [u8]) -> Result<()>;

    /// Loads 8 bytes at once, as a little-endian number, with acquire ordering.
    /// `off` is a multiple of 8.
    fn load(&self, off: u64) -> Result<u64>;

    /// Copies bytes into the region, in any order and granularity.
    fn write(&self, off: u64, from: &[u8]) -> Result<()>;

    /// Stores 8 bytes at once, little-endian, with release ordering: a crash or
    /// another CPU sees all or none of it. `off` is a multiple of 8.
    fn store(&self, off: u64, value: u64) -> Result<()>;

    /// Copies 8-byte words as [`load`](Pmem::load) and [`store`](Pmem::store) would, one by one, in
    /// whatever order suits ranges that overlap. Both offsets are multiples of 8.
    fn shift(&self, from: u64, to: u64, words: usize) -> Result<()> {
        let at = |index: usize| 8 * index as u64;
        let one = |off| self.store(to.saturating_add(off), self.load(from.saturating_add(off))?);
        if to <= from {
            (0..words).map(at).try_for_each(one)
        } else {
            (0..words).rev().map(at).try_for_each(one)
        }
    }

    /// Of `count` words, each `stride` words after the one before, in ascending order from `off` on, the
    /// first that is not below `value`: its index, or `count`. If they are not in order, any index.
    fn lower_bound(&self, off: u64, stride: usize, count: usize, value: u64) -> Result<usize> {
        let (mut low, mut high) = (0, count);
        while low < high {
            let mid = low + (high - low) / 2;
            let at = off.saturating_add((8 * stride * mid) as u64);
            if self.load(at)? < value {
                low = mid + 1;
            } else {
                high = mid;
            }
        }
        Ok(low)
    }

    /// Starts the write-back of all cache lines that the range touches.
    fn flush(&self, off: u64, len: u64) -> Result<()>;

    /// Waits until every write-back started before is durable.
    fn fence(&self);

    /// Keeps what was read before this call, by [`read`](Pmem::read) too, from
    /// being read after what is loaded after it. Only for a model of memory to
    /// replace: an ordinary one needs nothing else.
    fn load_fence(&self) {
        fence(Ordering::Acquire);
    }

    /// A hint: the lines of a range will be read soon. Any range is allowed.
    fn prefetch(&self, _off: u64, _len: u64) {}

    /// Asked again and again while all records are gone over: an error, which is
    /// [`Error::Interrupted`], ends that.
    fn go_on(&self) -> Result<()> {
        Ok(())
    }

    /// CRC32C of `data`, continuing from `crc` (0 at the start):
    /// `crc32c(crc32c(0, a), b)` is the CRC32C of `a` followed by `b`.
    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        crc32c_software(crc, data)
    }
}

impl<P: Pmem + ?Sized> Pmem for &P {
    fn len(&self) -> u64 {
        (**self).len()
    }
    fn read(&self, off: u64, to: &mut [u8]) -> Result<()> {
        (**self).read(off, to)
    }
    fn load(&self, off: u64) -> Result<u64> {
        (**self).load(off)
    }
    fn write(&self, off: u64, from: &[u8]) -> Result<()> {
        (**self).write(off, from)
    }
    fn store(&self, off: u64, value: u64) -> Result<()> {
        (**self).store(off, value)
    }
    fn shift(&self, from: u64, to: u64, words: usize) -> Result<()> {
        (**self).shift(from, to, words)
    }
    fn lower_bound(&self, off: u64, stride: usize, count: usize, value: u64) -> Result<usize> {
        (**self).lower_bound(off, stride, count, value)
    }
    fn flush(&self, off: u64, len: u64) -> Result<()> {
        (**self).flush(off, len)
    }
    fn fence(&self) {
        (**self).fence()
    }
    fn load_fence(&self) {
        (**self).load_fence()
    }
    fn prefetch(&self, off: u64, len: u64) {
        (**self).prefetch(off, len)
    }
    fn go_on(&self) -> Result<()> {
        (**self).go_on()
    }
    fn crc32c(&self, crc: u32, data: &[u8]) -> u32 {
        (**self).crc32c(crc, data)
    }
}

/// One byte's worth of the CRC32C polynomial division, for each byte value.
const CRC_TABLE: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 != 0 {
                (crc >> 1) ^ 0x82f6_3b78
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

/// CRC32C without help of the CPU; see [`Pmem::crc32c`].
pub fn crc32c_software(crc: u32, data: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        let at = usize::from((crc as u8) ^ *byte);
        (crc >> 8) ^ CRC_TABLE.get(at).copied().unwrap_or(0)
    };
    !data.iter().fold(!crc, step)
}

/// Number of cache lines that a range touches.
pub(super) fn lines_of(off: u64, len: u64) -> u64 {
    if len == 0 {
        return 0;
    }
    let end = off.saturating_add(len - 1);
    end / LINE_SIZE - off / LINE_SIZE + 1
}

/// Little-endian numbers in a byte buffer; what lies outside it is an error.
pub(super) fn get_u16(bytes: &[u8], at: usize) -> Result<u16> {
    get::<2>(bytes, at).map(u16::from_le_bytes)
}

pub(super) fn get_u32(bytes: &[u8], at: usize) -> Result<u32> {
    get::<4>(bytes, at).map(u32::from_le_bytes)
}

pub(super) fn get_u64(bytes: &[u8], at: usize) -> Result<u64> {
    get::<8>(bytes, at).map(u64::from_le_bytes)
}

pub(super) fn get<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    let end = at.checked_add(N).ok_or(Error::Invalid)?;
    let part = bytes.get(at..end).ok_or(Error::Invalid)?;
    part.try_into().map_err(|_| Error::Invalid)
}

pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) -> Result<()> {
    let end = at.checked_add(value.len()).ok_or(Error::Invalid)?;
    let part = bytes.get_mut(at..end).ok_or(Error::Invalid)?;
    part.copy_from_slice(value);
    Ok(())
}
