// SPDX-License-Identifier: GPL-2.0-only
//! What operations did to persistent memory.
