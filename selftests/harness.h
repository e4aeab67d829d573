/* SPDX-License-Identifier: GPL-2.0 */
/* The kernel's harness. On a slow kernel each test may take longer: see slowness(). */
#ifndef PMSKB_SELFTESTS_HARNESS_H
#define PMSKB_SELFTESTS_HARNESS_H

#include "common.h"
#include "kselftest_harness.h"

#undef TEST_F
#define TEST_F(fixture_name, test_name) \
	TEST_F_TIMEOUT(fixture_name, test_name, TEST_TIMEOUT_DEFAULT)
#undef TEST_F_TIMEOUT
#define TEST_F_TIMEOUT(fixture_name, test_name, timeout) \
	__TEST_F_IMPL(fixture_name, test_name, -1, (timeout) * slowness())

#endif
