package service

import (
	"cmp"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/model"
)

// drains are uses of TCP whose endpoint is gone, and since when. The pinned map
// draining holds the same, so that the limit of a connection does not begin again with
// each start of the agent.
type drains map[use]time.Time

// bootTime is when the clock began that programs and other processes have, too.
func bootTime() (time.Time, error) {
	var now unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	return time.Now().Add(-time.Duration(now.Nano())), err
}

// readDrains reads what the process before has noted.
func readDrains(m *ebpf.Map) (drains, error) {
	boot, err := bootTime()
	if err != nil {
		return nil, err
	}
	noted, err := bpfmap.New[datapathUse, uint64](m).All()
	if err != nil {
		return nil, err
	}
	all := drains{}
	for key, since := range noted {
		u := use{Frontend{endOf(key.Service, key.ServicePort), model.TCP}, endOf(key.Endpoint, key.EndpointPort)}
		all[u] = boot.Add(time.Duration(since))
	}
	return all, nil
}

// note makes the map hold these instead of those before.
func (d drains) note(m *ebpf.Map, before drains) error {
	boot, err := bootTime()
	if err != nil {
		return err
	}
	var failed error // the first: when the map is full there may be many
	for u := range before {
		if _, still := d[u]; !still {
			failed = cmp.Or(failed, gone(m.Delete(u.key())))
		}
	}
	for u, since := range d {
		if was, noted := before[u]; !noted || !was.Equal(since) {
			failed = cmp.Or(failed, m.Put(u.key(), uint64(since.Sub(boot))))
		}
	}
	if failed != nil {
		return fmt.Errorf("write %s: %w", datapathMapDraining, failed)
	}
	return nil
}

func (u use) key() datapathUse {
	return datapathUse{
		Service: datapathAddress{Word: bpfmap.AddrWords(u.frontend.Address.Addr())}, ServicePort: portOf(u.frontend.Address.Port()),
		Endpoint: datapathAddress{Word: bpfmap.AddrWords(u.endpoint.Addr())}, EndpointPort: portOf(u.endpoint.Port()),
	}
}
