package queue

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/netns"
)

// newNetns is a network namespace of the test's own, with a device pair of two queues.
func newNetns(t *testing.T) In {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	path := filepath.Join(t.TempDir(), "net")
	if err := netns.Create(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netns.Remove(path) })
	err := netns.Do(path, func() error {
		v0 := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "v0", NumTxQueues: 2, NumRxQueues: 2}, PeerName: "v1", PeerNumTxQueues: 2, PeerNumRxQueues: 2,
		}
		if err := netlink.LinkAdd(v0); err != nil {
			return err
		}
		return netlink.LinkSetUp(v0)
	})
	if err != nil {
		t.Fatal(err)
	}
	return In(path)
}

// Each kind of setting is written, read back, and put back.
func TestWriteReadsBackInItsNamespace(t *testing.T) {
	n := newNetns(t)
	for _, row := range []struct{ name, before, value string }{
		{"v0/rx-0/rps_cpus", "0", "1"},
		{"v0/tx-1/xps_cpus", "0", "1"},
		{"v0/qdisc", "default noqueue", "pfifo"},
		{"v0/channels", "2", "1"},
	} {
		before, err := n.Read(row.name)
		if err != nil || before != row.before {
			t.Errorf("%s is %q, %v; want %q", row.name, before, err, row.before)
			continue
		}
		for _, value := range []string{row.value, before} {
			if got, err := n.Write(row.name, value); err != nil || got != value {
				t.Errorf("%s = %s: %q, %v", row.name, value, got, err)
			}
			if got, err := n.Read(row.name); err != nil || got != value {
				t.Errorf("%s is %q, %v after %s was set", row.name, got, err, value)
			}
		}
	}
}

func TestReadAll(t *testing.T) {
	values, unread, err := newNetns(t).ReadAll([]string{"v0/qdisc", "v0/ring/rx", "v0/rx-1/rps_cpus"})
	if err != nil || len(values) != 2 || values["v0/qdisc"] != "default noqueue" || !errors.Is(unread["v0/ring/rx"], ErrAbsent) {
		t.Errorf("%q, %v, %v", values, unread, err)
	}
}

func TestWhyNot(t *testing.T) {
	n := newNetns(t)
	for _, row := range []struct {
		name, value string
		want        error
	}{
		{"absent/rx-0/rps_cpus", "1", ErrAbsent},
		{"absent/qdisc", "pfifo", ErrAbsent},
		{"v0/rx-7/rps_cpus", "1", ErrAbsent},
		{"v0/ring/rx", "512", ErrAbsent},
		{"v0/nonsense", "1", ErrAbsent},
		{"v0/../../lo/rx-0/rps_cpus", "1", ErrAbsent},
		{"v0/rx-0/rps_cpus", "many", ErrRefused},
		{"v0/channels", "77", ErrRefused},
		{"v0/channels", "many", ErrRefused},
		{"v0/qdisc", "absent", ErrRefused},
	} {
		if got, err := n.Write(row.name, row.value); !errors.Is(err, row.want) {
			t.Errorf("%s = %s: %q, %v; want: %v", row.name, row.value, got, err, row.want)
		}
	}
}

func TestDevices(t *testing.T) {
	all, err := newNetns(t).Devices()
	if err != nil || len(all) != 2 {
		t.Fatalf("%+v, %v; want two", all, err)
	}
	if d := all[0]; d.Name != "v0" || d.Receive != 2 || d.Send != 2 || d.Hardware || d.Channels != 2 {
		t.Errorf("%+v", d)
	}
}

// A thread in a namespace sees the namespace's devices, whatever its /sys shows.
func TestDevicesOfThisThread(t *testing.T) {
	n := newNetns(t)
	err := netns.Do(string(n), func() error {
		all, err := In("").Devices()
		if err == nil && (len(all) != 2 || all[0].Name != "v0") {
			t.Errorf("%+v; want two", all)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// The machine's own devices are read, and nothing of them is written.
func TestOwnDevicesAreRead(t *testing.T) {
	all, err := In("").Devices()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range all {
		if value, err := In("").Read(d.Name + "/qdisc"); d.Up && (err != nil || value == "") {
			t.Errorf("%s: %q, %v", d.Name, value, err)
		}
		t.Logf("%+v", d)
	}
}

// The kernel writes masks in groups of 32 processors, with zeros before them.
func TestMasks(t *testing.T) {
	for kernels, ours := range map[string]string{"0": "0", "0f": "f", "00000000,000000ff": "ff", "1,00000000": "100000000", "ffffffff,ffffffff,f0000000": "fffffffffffffffff0000000"} {
		if got := plain(kernels); got != ours {
			t.Errorf("%s is %s, want %s", kernels, got, ours)
		}
		if got := plain(grouped(ours)); got != ours {
			t.Errorf("%s is written %s", ours, grouped(ours))
		}
	}
	if got := grouped("100000000"); got != "1,00000000" {
		t.Errorf("written %s", got)
	}
}
