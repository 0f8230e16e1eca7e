package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/layer/pod/pool"
)

// leasesOfOthers are the addresses that the plugin host-local has given, which is behind
// bridge, ptp and flannel: below the folder each network has one, with a file for each
// address, named by it
// (https://github.com/containernetworking/plugins/tree/main/plugins/ipam/host-local/backend/disk).
// The files outlive a boot, the pods do not: those from before it count for nothing.
func leasesOfOthers(folder string, boot time.Time) (all []netip.Addr, err error) {
	networks, err := os.ReadDir(folder)
	if folder == "" || errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for addresses that others have given: %w", err)
	}
	for _, network := range networks {
		if !network.IsDir() {
			continue
		}
		files, err := os.ReadDir(filepath.Join(folder, network.Name()))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("look for addresses that others have given: %w", err)
		}
		for _, file := range files {
			addr, err := netip.ParseAddr(file.Name())
			if err != nil {
				continue // its lock, and which one it has given last
			}
			if info, err := file.Info(); err == nil && info.ModTime().After(boot) {
				all = append(all, addr)
			}
		}
	}
	return all, nil
}

// releaseOfOthers takes back what host-local has given a container, as host-local itself does
// when it ends: who asks us about a pod of before does not ask the plugin that gave it its
// network any more.
func releaseOfOthers(folder string, key pool.Key) error {
	if folder == "" {
		return nil
	}
	files, err := filepath.Glob(filepath.Join(folder, "*", "*"))
	if err != nil {
		return err
	}
	for _, file := range files {
		if _, err := netip.ParseAddr(filepath.Base(file)); err != nil {
			continue
		}
		text, err := os.ReadFile(file)
		container, device, _ := strings.Cut(strings.TrimSpace(string(text)), "\r\n")
		if err != nil || container != key.Container || device != "" && device != key.Interface {
			continue
		}
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("take back an address of host-local: %w", err)
		}
	}
	return nil
}

// bootTime is when the machine has started (sysinfo(2)), to a second.
func bootTime() time.Time {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return time.Time{}
	}
	return time.Now().Add(-time.Duration(info.Uptime+1) * time.Second)
}
