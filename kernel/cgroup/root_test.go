package cgroup

import (
	"errors"
	"strings"
	"testing"
)

func TestRootIsTheHighestMount(t *testing.T) {
	for _, row := range []struct{ what, mounts, want string }{
		{"a host", "36 35 0:31 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw", "/sys/fs/cgroup"},
		{"a hybrid host", "30 29 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n" +
			"36 35 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw", "/sys/fs/cgroup/unified"},
		{"a container that has the host's, too", "36 35 0:31 / /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n" +
			"37 35 0:31 /../../.. /host/cgroup rw - cgroup2 cgroup2 rw", "/host/cgroup"},
		{"a part that is mounted", "36 35 0:31 /kubepods /mnt rw - cgroup2 cgroup2 rw", ""},
	} {
		got, err := rootIn(strings.NewReader(row.mounts))
		if got != row.want || (row.want == "") != errors.Is(err, ErrNoCgroup2) {
			t.Errorf("%s: %q, %v; want %q", row.what, got, err, row.want)
		}
	}
}
