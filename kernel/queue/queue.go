// Package queue reads and writes how a network device spreads packets: over its queues,
// over processors (RPS, XPS), and in what order it sends them (the queueing discipline).
//
// A setting has a name with slashes, the device's first: "eth0/rx-0/rps_cpus",
// "eth0/tx-1/xps_cpus", "eth0/qdisc", "eth0/ring/rx", "eth0/channels". Values are text,
// as those of package sysctl: masks of processors in hexadecimal, packets, queues, the
// kind of a discipline.
//
// It writes what it is told to and nothing else, reads it back, and says why that cannot
// be. For another namespace it costs a thread with mounts of its own, which is thrown
// away: about 2 milliseconds. Masks of processors are files of sysfs, channels and rings
// are asked for by ethtool's ioctl, disciplines by rtnetlink.
package queue

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/sysctl"
)

// Why a setting of a device cannot be read or written.
var (
	ErrAbsent   = errors.New("this device has no such setting")
	ErrReadOnly = errors.New("the file system is read-only: in a container mount the node's /sys writable")
	ErrRefused  = errors.New("the kernel or the driver refuses this value")
)

// Default is before the name of a discipline that nobody has chosen: "default noqueue".
// Writing it takes away what was chosen.
const Default = "default "

const classNet = "/sys/class/net"

// Device is a network device, as far as it can be tuned.
type Device struct {
	Name string
	// Hardware says that a driver of a bus serves it; Up, that it is meant to be used.
	Hardware, Up bool
	// Receive and Send are how many queues it has.
	Receive, Send int
	// Channels is how many queues it can have at most, 0 where that cannot be asked.
	Channels int
	// Ring is how many packets its receive ring can have at most, 0 likewise.
	Ring int
	// Speed is in megabits a second, 0 where the device does not tell.
	Speed int
}

// In is the settings of the devices of the namespace bound to path; empty is the calling
// thread's.
type In string

// do runs f where /sys shows the namespace's devices: a mount shows those of the
// namespace in which it was made, which need not be this thread's. Without the privilege
// to make one, what is mounted has to do.
func (n In) do(f func() error) error {
	path := string(n)
	if n == "" {
		if need.Check("mount /sys", "CAP_SYS_ADMIN") != nil {
			return f()
		}
		path = fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
	}
	return netns.Do(path, func() error {
		err := unix.Unshare(unix.CLONE_NEWNS) // of this thread, which ends with f
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, "")
		}
		if err == nil {
			err = unix.Mount("sysfs", "/sys", "sysfs", 0, "")
		}
		if err != nil && !errors.Is(err, unix.EBUSY) { // busy: the namespace's own is there already
			return fmt.Errorf("mount its /sys: %w", err)
		}
		return f()
	})
}

// Devices lists the devices, without loopback.
func (n In) Devices() (all []Device, err error) {
	err = n.do(func() error {
		entries, err := os.ReadDir(classNet)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if d, err := look(e.Name()); err == nil && e.Name() != "lo" { // else it has gone
				all = append(all, d)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	return all, nil
}

func look(name string) (d Device, err error) {
	folder := filepath.Join(classNet, name)
	queues, err := os.ReadDir(filepath.Join(folder, "queues"))
	if err != nil {
		return d, err
	}
	d.Name = name
	_, driver := os.Stat(filepath.Join(folder, "device"))
	d.Hardware = driver == nil
	for _, q := range queues {
		if strings.HasPrefix(q.Name(), "rx-") {
			d.Receive++
		} else {
			d.Send++
		}
	}
	flags, _ := os.ReadFile(filepath.Join(folder, "flags"))
	bits, _ := strconv.ParseUint(strings.TrimSpace(string(flags)), 0, 32)
	d.Up = bits&unix.IFF_UP != 0
	speed, _ := os.ReadFile(filepath.Join(folder, "speed")) // EINVAL while it is down
	if n, err := strconv.Atoi(strings.TrimSpace(string(speed))); err == nil && n > 0 {
		d.Speed = n
	}
	if e, err := ethtool.NewEthtool(); err == nil {
		defer e.Close()
		if c, err := e.GetChannels(name); err == nil {
			d.Channels = int(max(c.MaxCombined, min(c.MaxRx, c.MaxTx)))
		}
		if r, err := e.GetRing(name); err == nil {
			d.Ring = int(r.RxMaxPending)
		}
	}
	return d, nil
}

// Read is the value of a setting.
func (n In) Read(name string) (value string, err error) {
	err = n.do(func() error {
		value, err = get(name)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	return value, nil
}

// ReadAll is the values of several settings at the cost of one, and why others have none.
func (n In) ReadAll(names []string) (values map[string]string, unread map[string]error, err error) {
	values, unread = map[string]string{}, map[string]error{}
	err = n.do(func() error {
		for _, name := range names {
			value, err := get(name)
			if err != nil {
				unread[name] = fmt.Errorf("read %s: %w", name, err)
				continue
			}
			values[name] = value
		}
		return nil
	})
	return values, unread, err
}

// Write sets a setting and returns what it is then. That is another value with a
// *sysctl.Clamped, unless it is the one that was written.
func (n In) Write(name, value string) (got string, err error) {
	err = n.do(func() error {
		if err := put(name, value); err != nil {
			return err
		}
		got, err = get(name)
		return err
	})
	if err == nil && got != value {
		err = &sysctl.Clamped{Wanted: value, Got: got}
	}
	if err != nil {
		return got, fmt.Errorf("set %s to %s: %w", name, value, err)
	}
	return got, nil
}

// file is the path of a setting that is a file; it is not if the kind is another's.
func file(device, what string) (path string, is bool) {
	queue, attribute, found := strings.Cut(what, "/")
	masks := []string{"rps_cpus", "xps_cpus"}
	is = found && slices.Contains(masks, attribute) && (strings.HasPrefix(queue, "rx-") || strings.HasPrefix(queue, "tx-"))
	return filepath.Join(classNet, filepath.Base(device), "queues", filepath.Base(queue), attribute), is
}

// plain is a mask without the zeros and commas that the kernel has in it: "f".
func plain(mask string) string {
	digits := strings.TrimLeft(strings.ReplaceAll(strings.TrimSpace(mask), ",", ""), "0")
	if digits == "" && mask != "" {
		return "0"
	}
	return digits
}

// grouped is a mask as the kernel reads it: a comma before each eight digits.
func grouped(mask string) string {
	for at := len(mask) - 8; at > 0; at -= 8 {
		mask = mask[:at] + "," + mask[at:]
	}
	return mask
}

func get(name string) (string, error) {
	device, what, _ := strings.Cut(name, "/")
	if path, is := file(device, what); is {
		data, err := os.ReadFile(path)
		return plain(string(data)), explain(err)
	}
	switch what {
	case "qdisc":
		return discipline(device)
	case "ring/rx":
		var r ethtool.Ring
		err := asked(func(e *ethtool.Ethtool) (err error) { r, err = e.GetRing(device); return err })
		return strconv.Itoa(int(r.RxPending)), err
	case "channels":
		var count *uint32
		err := asked(func(e *ethtool.Ethtool) error {
			c, err := e.GetChannels(device)
			if err == nil {
				count, _, err = counts(&c)
			}
			return err
		})
		if err != nil {
			return "", err
		}
		return strconv.Itoa(int(*count)), nil
	}
	return "", ErrAbsent
}

func put(name, value string) error {
	device, what, _ := strings.Cut(name, "/")
	if path, is := file(device, what); is {
		return explain(os.WriteFile(path, []byte(grouped(value)), 0))
	}
	if what == "qdisc" {
		return choose(device, value)
	}
	n, err := strconv.ParseUint(value, 10, 32)
	if err != nil {
		return ErrRefused
	}
	switch what {
	case "ring/rx":
		return asked(func(e *ethtool.Ethtool) error {
			r, err := e.GetRing(device)
			if err == nil {
				r.RxPending = uint32(n)
				_, err = e.SetRing(device, r)
			}
			return err
		})
	case "channels":
		return asked(func(e *ethtool.Ethtool) error {
			c, err := e.GetChannels(device)
			if err != nil {
				return err
			}
			both, other, err := counts(&c)
			if err == nil {
				*both, *other = uint32(n), uint32(n)
				_, err = e.SetChannels(device, c)
			}
			return err
		})
	}
	return ErrAbsent
}

// counts are where a device has its number of queues: one number for both directions,
// or two, which must be alike.
func counts(c *ethtool.Channels) (one, other *uint32, err error) {
	if c.MaxCombined > 0 {
		return &c.CombinedCount, &c.CombinedCount, nil
	}
	if c.RxCount != c.TxCount {
		return nil, nil, fmt.Errorf("%w: it has %d queues to receive and %d to send", ErrAbsent, c.RxCount, c.TxCount)
	}
	return &c.RxCount, &c.TxCount, nil
}

// asked is by ethtool's ioctl, in the calling thread's namespace.
func asked(f func(*ethtool.Ethtool) error) error {
	e, err := ethtool.NewEthtool()
	if err != nil {
		return err
	}
	defer e.Close()
	return explain(f(e))
}

// discipline is the kind of the one at the root of a device.
func discipline(device string) (string, error) {
	l, err := netlink.LinkByName(device)
	if err != nil {
		return "", explain(err)
	}
	all, err := netlink.QdiscList(l)
	if err != nil {
		return "", explain(err)
	}
	for _, q := range all {
		if q.Attrs().Parent != netlink.HANDLE_ROOT {
			continue
		}
		if q.Attrs().Handle == 0 { // the kernel's own have none
			return Default + q.Type(), nil
		}
		return q.Type(), nil
	}
	return "", fmt.Errorf("%w while it is down", ErrAbsent)
}

func choose(device, kind string) error {
	l, err := netlink.LinkByName(device)
	if err != nil {
		return explain(err)
	}
	attrs := netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_ROOT, Handle: netlink.MakeHandle(1, 0)}
	if _, none := strings.CutPrefix(kind, Default); none {
		attrs.Handle = 0
		err := netlink.QdiscDel(&netlink.GenericQdisc{QdiscAttrs: attrs})
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) { // nobody has chosen one
			return nil
		}
		return explain(err)
	}
	err = netlink.QdiscReplace(&netlink.GenericQdisc{QdiscAttrs: attrs, QdiscType: kind})
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%w: there is no discipline %s in this kernel: load its module (sch_%s)", ErrRefused, kind, kind)
	}
	return explain(err)
}

func explain(err error) error {
	var none netlink.LinkNotFoundError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &none), errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.EOPNOTSUPP):
		return ErrAbsent
	case errors.Is(err, unix.EROFS):
		return ErrReadOnly
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE), errors.Is(err, unix.EOVERFLOW):
		return ErrRefused
	}
	return err
}
