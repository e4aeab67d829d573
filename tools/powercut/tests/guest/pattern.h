/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the module and the program both do to persistent memory. A word's value
 * names who stored it, in which line and where: 0xP0000000000llllw.
 */
#ifndef POWERCUT_PATTERN_H
#define POWERCUT_PATTERN_H

typedef volatile unsigned long long word;

static inline unsigned long long value(unsigned int pattern, int line, int w)
{
	return (unsigned long long)pattern << 60 | (unsigned long long)line << 4 | w;
}

/* The no-op by which a guest speaks to the plugin; see README.md. */
static inline void mark(void)
{
	asm volatile("nopl 0x6b736d70(%%rax)" ::: "memory");
}

static inline void clwb_line(word *p)
{
	asm volatile("clwb (%0)" :: "r"(p) : "memory");
}

static inline void clflushopt_line(word *p)
{
	asm volatile("clflushopt (%0)" :: "r"(p) : "memory");
}

static inline void clflush_line(word *p)
{
	asm volatile("clflush (%0)" :: "r"(p) : "memory");
}

static inline void sfence(void)
{
	asm volatile("sfence" ::: "memory");
}

static inline void mfence(void)
{
	asm volatile("mfence" ::: "memory");
}

static inline void store_line(word *p, unsigned int pattern, int line)
{
	int w;

	for (w = 0; w < 8; w++)
		p[line * 8 + w] = value(pattern, line, w);
}

static inline void movnti_word(word *p, unsigned int pattern, int line, int w)
{
	asm volatile("movnti %1, %0"
		     : "=m"(p[line * 8 + w]) : "r"(value(pattern, line, w)) : "memory");
}

static inline void movnti_line(word *p, unsigned int pattern, int line)
{
	int w;

	for (w = 0; w < 8; w++)
		movnti_word(p, pattern, line, w);
}

#endif
