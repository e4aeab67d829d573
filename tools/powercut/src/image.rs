// SPDX-License-Identifier: GPL-2.0-only
//! The image that a cut leaves.

use crate::model::{LINE, Lose, Memory, Model};
use crate::stats::Damage;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Lines in the piece that is made and written at once.
const PIECE: usize = 4096 / LINE;

/// Makes the image and, if `out` names a file, writes it there, zeros as holes.
///
/// `extents` are the parts that may hold something other than zeros; `labels`
/// follow the region and are always kept.
pub fn cut<M: Memory>(
    model: &Model<M>,
    extents: &[Range<usize>],
    labels: &[u8],
    lose: Lose,
    seed: u64,
    out: Option<&File>,
) -> io::Result<Damage> {
    let mut damage = Damage {
        lines_pending: model.pending_lines() as u64,
        ..Damage::default()
    };
    let size = model.lines() * LINE;
    if let Some(file) = out {
        file.set_len((size + labels.len()) as u64)?;
        file.write_all_at(labels, size as u64)?;
    }
    let mut next = 0;
    for extent in extents {
        let first = next.max(extent.start / LINE / PIECE * PIECE);
        let end = model.lines().min(extent.end.div_ceil(LINE));
        for start in (first..end).step_by(PIECE) {
            let stop = model.lines().min(start + PIECE);
            let piece = piece(model, start..stop, lose, seed, &mut damage);
            next = stop;
            if let Some(file) = out.filter(|_| piece.iter().any(|&b| b != 0)) {
                file.write_all_at(&piece, (start * LINE) as u64)?;
            }
        }
    }
    Ok(damage)
}

fn piece<M: Memory>(
    model: &Model<M>,
    lines: Range<usize>,
    lose: Lose,
    seed: u64,
    damage: &mut Damage,
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(PIECE * LINE);
    for line in lines {
        let kept = model.durable(line);
        if !model.at_risk(line) {
            bytes.extend(kept);
            continue;
        }
        let now = model.now(line);
        let left = model.after_cut(line, lose, seed);
        damage.lines_dirty += u64::from(now != kept);
        damage.lines_lost += u64::from(left != now);
        damage.lines_torn += u64::from(left != now && left != kept);
        bytes.extend(left);
    }
    bytes
}

/// Writes a file under another name and moves it into place, so that a file at
/// `path` is always whole; `path` may even be the backing file itself.
pub fn replace<T>(path: &Path, write: impl FnOnce(&File) -> io::Result<T>) -> Result<T, String> {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    let temporary = PathBuf::from(name);
    let written = File::create(&temporary).and_then(|file| {
        let result = write(&file)?;
        fs::rename(&temporary, path)?;
        Ok(result)
    });
    written.map_err(|e| format!("{}: {e}", path.display()))
}

/// Writes text as a whole; see [`replace`].
pub fn replace_text(path: &Path, text: &str) -> Result<(), String> {
    replace(path, |mut file| file.write_all(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Line;

    /// A file name that no other test uses.
    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("powercut-{}-{name}", std::process::id()))
    }

    struct Ram(Vec<u8>);

    impl Memory for Ram {
        fn line(&self, index: usize) -> Line {
            self.0[index * LINE..][..LINE].try_into().unwrap()
        }
    }

    /// 10 pages and a half; lines 3 and 300 stored, 300 also flushed and fenced.
    fn model() -> Model<Ram> {
        let mut ram = Ram(vec![0; 672 * LINE]);
        ram.0[3 * LINE..4 * LINE].fill(1);
        ram.0[300 * LINE..301 * LINE].fill(2);
        let mut model = Model::new(ram, vec![0; 672 * LINE], 1);
        model.flush(0, 300);
        model.fence(0);
        model
    }

    #[test]
    fn writes_what_is_left_and_the_labels() {
        let model = model();
        let path = scratch("image");
        for (lose, lost) in [(Lose::All, 1), (Lose::None, 0)] {
            let damage = replace(&path, |file| {
                // Extents that share a page, and one that ends beyond the region.
                let extents = [100..200, 300..4000, 16384..1 << 20];
                cut(&model, &extents, &[7; 64], lose, 0, Some(file))
            })
            .unwrap();
            assert_eq!((damage.lines_dirty, damage.lines_lost), (1, lost));
            let image = fs::read(&path).unwrap();
            assert_eq!(image.len(), 673 * LINE);
            for (i, line) in image.chunks(LINE).enumerate() {
                let want = match i {
                    3 if lose == Lose::None => 1,
                    300 => 2,
                    672 => 7,
                    _ => 0,
                };
                assert_eq!(line, [want; LINE], "line {i}");
            }
        }
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_torn_line_is_counted() {
        let model = model();
        let everything = 0..672 * LINE;
        let torn = (0..64).filter(|&seed| {
            let extents = std::slice::from_ref(&everything);
            let d = cut(&model, extents, &[], Lose::Random, seed, None).unwrap();
            d.lines_torn == 1
        });
        assert!((1..64).contains(&torn.count()));
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let path = scratch("kept");
        fs::write(&path, "old").unwrap();
        let failed: Result<(), String> = replace(&path, |_| Err(io::Error::other("full")));
        assert!(failed.unwrap_err().contains("full"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        replace_text(&path, "new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        fs::remove_file(&path).unwrap();
        let _ = fs::remove_file(path.with_extension("tmp"));
        assert!(replace_text(Path::new("/nowhere/x"), "").is_err());
    }
}
