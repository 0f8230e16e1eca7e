package service

import (
	"testing"
	"time"
)

// An agent that is killed while connections drain leaves their limit to the next one,
// however often that happens: it is over when it would have been with the first.
func TestTheDrainLimitGoesOnWithTheNextAgent(t *testing.T) {
	for _, path := range []Path{PathSocket, PathPacket} {
		t.Run(string(path), func(t *testing.T) {
			v := newVillage(t, Settings{Path: path, Drain: time.Hour})
			client, one, other := v.pod(), v.pod().servesAll("one"), v.pod().servesAll("other")
			leave := client.stay() // a process, by which its namespace is found
			defer leave()
			v.open(dnsAt(one))
			_, streams := v.callAll(client.netns)
			v.become(dnsAt(other))
			v.looks()
			began := time.Now()
			v.notes(len(streams))
			for range 2 {
				v.ticksUntil(time.Now().Add(time.Second))
				v.reopen(dnsAt(other))
				v.looks()
				v.notes(len(streams))
			}
			v.allTalk(streams)
			v.layer.settings.Drain = time.Since(began)
			v.reopen(dnsAt(other))
			v.looks()
			if n := v.reason(closedTCP); n != uint64(len(streams)) {
				t.Errorf("%d connections are closed of %d whose limit of %v is over", n, len(streams), v.layer.settings.Drain)
			}
			v.closes(waiting(streams)...)
		})
	}
}

// An endpoint was gone, has come back, and is gone again: who has connected meanwhile
// has the whole limit, whoever closed what had been before.
func TestTheDrainLimitBeginsWhenAnEndpointGoesAgain(t *testing.T) {
	const drain = lookAgain + 500*time.Millisecond // nobody looks once more after it
	for name, comeBack := range map[string]func(*village, *pod){
		"the same agent": func(v *village, p *pod) { v.become(dnsAt(p)) },
		"another agent":  func(v *village, p *pod) { v.reopen(dnsAt(p)) },
	} {
		t.Run(name, func(t *testing.T) {
			v := newVillage(t, Settings{Drain: drain})
			client, server := v.pod(), v.pod().servesAll("server")
			v.open(dnsAt(server))
			_, streams := v.callAll(client.netns)
			v.become(dnsAt())
			v.closes(waiting(streams)...)
			v.settles()
			comeBack(v, server)
			_, streams = v.callAll(client.netns)
			gone := time.Now()
			v.become(dnsAt())
			v.closes(waiting(streams)...)
			if took := time.Since(gone); took < drain {
				t.Errorf("connections were closed after %v, want %v", took, drain)
			}
		})
	}
}

// What nobody waits for any more is not noted for ever.
func TestWhatDrainsIsNotedWhileItDoes(t *testing.T) {
	v := newVillage(t, Settings{Drain: time.Hour})
	client, first, second := v.pod(), v.pod().servesAll("first"), v.pod().servesAll("second")
	v.open(dnsAt(first))
	_, streams := v.callAll(client.netns)
	v.become(dnsAt(second))
	v.looks()
	v.notes(len(streams))
	for _, c := range streams {
		hangUp(c.conn)
	}
	v.looks()
	v.notes(0)
}

// notes fails the test unless so many uses are noted in the kernel.
func (v *village) notes(want int) {
	v.t.Helper()
	noted, err := readDrains(v.layer.datapath.maps[datapathMapDraining])
	v.must(err)
	if len(noted) != want || len(v.layer.stuck.drains) != want {
		v.t.Errorf("%v are noted, %v drain, want %d", noted, v.layer.stuck.drains, want)
	}
}

// ticksUntil is an agent that works until a moment.
func (v *village) ticksUntil(end time.Time) {
	v.t.Helper()
	for time.Now().Before(end) {
		v.tick()
		time.Sleep(10 * time.Millisecond)
	}
}
