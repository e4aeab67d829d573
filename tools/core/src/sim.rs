// SPDX-License-Identifier: GPL-2.0

//! Persistent memory with a cache that can be lost.
