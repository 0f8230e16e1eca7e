package service

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
)

// knownClient is a network namespace of this node and its addresses: the Subject of a
// change of the map clients. A socket that connects has none yet, so Services that
// ask for their clients' addresses look there.
type knownClient struct {
	cookie uint64
	addresses
}

// Object implements layer.Subject.
func (c knownClient) Object() string { return fmt.Sprintf("client of namespace %d", c.cookie) }

// Detail implements layer.Subject.
func (c knownClient) Detail() string {
	return c.join(", ")
}

// clientsAtMost is how long a namespace that got its address after its device is
// unknown at most.
const clientsAtMost = sweepEvery

// findClients lists the namespaces of this node's pods. It looks only when devices
// have come or gone, or some time has passed: a look costs 0.3 ms a namespace.
func (d *datapath) findClients(devices []veth) []knownClient {
	var indexes []int
	for _, v := range devices {
		if v.PeerElsewhere {
			indexes = append(indexes, v.Index)
		}
	}
	if slices.Equal(indexes, d.looked.devices) && time.Since(d.looked.at) < clientsAtMost {
		return d.looked.found
	}
	spaces, _ := netns.Spaces(d.settings.Netns) // what may not be looked into stays unknown
	var found []knownClient
	for _, space := range spaces {
		if its := firstOf(space.Addresses); its != (addresses{}) {
			found = append(found, knownClient{space.Cookie, its})
		}
	}
	d.looked = lookedAt{indexes, time.Now(), found}
	return found
}

// lookedAt is what the last look for clients found.
type lookedAt struct {
	devices []int
	at      time.Time
	found   []knownClient
}

// readClients reads the map clients.
func (d *datapath) readClients() ([]knownClient, error) {
	var all []knownClient
	var cookie uint64
	var value datapathAddresses
	entries := d.maps[datapathMapClients].Iterate()
	for entries.Next(&cookie, &value) {
		all = append(all, knownClient{cookie, addressesOf(value)})
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", datapathMapClients, err)
	}
	return all, nil
}

// diffClients says which namespaces the programs have to know. The node's own
// processes are clients with the node's address.
func diffClients(have *Picture, want paths, prune bool) (first, last layer.Changes) {
	wanted := map[uint64]knownClient{}
	if want.clients {
		for _, c := range have.found {
			wanted[c.cookie] = c
		}
		if own := firstOf(want.node); have.node != 0 && own != (addresses{}) {
			wanted[have.node] = knownClient{have.node, own}
		}
	}
	for _, c := range have.clients {
		now, there := wanted[c.cookie]
		switch {
		case there && now != c:
			first = append(first, layer.Change{Op: layer.Alter, Subject: now})
		case !there && prune:
			last = append(last, layer.Change{Op: layer.Remove, Subject: c})
		}
		delete(wanted, c.cookie)
	}
	for _, c := range have.found {
		if _, new := wanted[c.cookie]; new {
			first = append(first, layer.Change{Op: layer.Add, Subject: c})
			delete(wanted, c.cookie)
		}
	}
	for _, own := range wanted {
		first = append(first, layer.Change{Op: layer.Add, Subject: own})
	}
	return first, last
}

// withClients adds the clients to the changes that come before the Services, if these
// are the first that ask for them: nobody has looked for them yet, and a client that is
// known later than the Service would get another endpoint then.
func (l *Layer) withClients(have, want *Picture, first layer.Changes) layer.Changes {
	if l.asked || !want.paths.clients {
		return first
	}
	have.found = l.room.findClients(have.veths)
	known, _ := diffClients(have, want.paths, false)
	return append(slices.DeleteFunc(slices.Clone(first), func(change layer.Change) bool {
		_, client := change.Subject.(knownClient)
		return client
	}), known...)
}

// know writes or removes a client.
func (d *datapath) know(change layer.Change) error {
	c := change.Subject.(knownClient)
	if change.Op == layer.Remove {
		return gone(d.maps[datapathMapClients].Delete(c.cookie))
	}
	unknown, err := d.inherit(c)
	if err == nil {
		err = d.maps[datapathMapClients].Put(c.cookie, c.value())
	}
	for _, key := range unknown {
		err = errors.Join(err, gone(d.maps[datapathMapAffinities].Delete(key)))
	}
	return err
}

// unknownClient is UNKNOWN_CLIENT of client.h.
const unknownClient = 0xff

// inherit lets a client stay with the endpoints that it got while nobody knew its
// address, and returns the keys of what it was then.
func (d *datapath) inherit(c knownClient) (unknown []datapathAffinityKey, err error) {
	before := [4]uint32{unknownClient, 0, uint32(c.cookie >> 32), uint32(c.cookie)}
	had := map[datapathAffinityKey]datapathAffinity{}
	var key datapathAffinityKey
	var value datapathAffinity
	entries := d.maps[datapathMapAffinities].Iterate()
	for entries.Next(&key, &value) {
		if key.Client.Word == before {
			had[key] = value
		}
	}
	err = entries.Err()
	for key, value := range had {
		unknown = append(unknown, key)
		var backend datapathBackend
		if d.maps[datapathMapBackends].Lookup(value.Number, &backend) != nil {
			continue // it is gone
		}
		own := c.ip4
		if bpfmap.AddrOf(backend.Address.Word).Is6() {
			own = c.ip6
		}
		if !own.IsValid() {
			continue
		}
		key.Client.Word = bpfmap.AddrWords(own)
		if put := d.maps[datapathMapAffinities].Update(key, value, ebpf.UpdateNoExist); !errors.Is(put, ebpf.ErrKeyExist) {
			err = errors.Join(err, put)
		}
	}
	if err != nil {
		err = fmt.Errorf("keep the endpoints of a client that was unknown: %w", err)
	}
	return unknown, err
}

// sweepAffinities forgets which endpoints clients had whose time is over, or whose
// endpoint serves no more: the Service may be deleted long before.
func (d *datapath) sweepAffinities() error {
	now, err := monotonicSeconds()
	if err != nil {
		return fmt.Errorf("sweep affinities: %w", err)
	}
	var over []datapathAffinityKey
	var key datapathAffinityKey
	var value datapathAffinity
	entries := d.maps[datapathMapAffinities].Iterate()
	for entries.Next(&key, &value) {
		if d.affinityOver(key, value, now) {
			over = append(over, key)
		}
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("read %s: %w", datapathMapAffinities, err)
	}
	for _, key := range over {
		if err := d.forgetAffinity(key, now); err != nil {
			return fmt.Errorf("sweep affinities: %w", err)
		}
	}
	return nil
}

func monotonicSeconds() (uint32, error) {
	var now unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	return uint32(now.Sec), err
}

func (d *datapath) affinityOver(key datapathAffinityKey, value datapathAffinity, now uint32) bool {
	if int32(value.Until-now) < 0 {
		return true
	}
	var backend datapathBackend
	err := d.maps[datapathMapBackends].Lookup(value.Number, &backend)
	return errors.Is(err, ebpf.ErrKeyNotExist) || err == nil && backend.Service != key.Service
}

// forgetAffinity removes what was over when it was read. If the client has come back
// meanwhile, it is what the client has now, and is put back, unless there is newer yet.
func (d *datapath) forgetAffinity(key datapathAffinityKey, now uint32) error {
	m := d.maps[datapathMapAffinities]
	var value datapathAffinity
	if err := m.LookupAndDelete(key, &value); err != nil {
		return gone(err)
	}
	if d.affinityOver(key, value, now) {
		return nil
	}
	err := m.Update(key, value, ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		return nil
	}
	return err
}
