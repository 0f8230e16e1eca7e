package nodedns

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"testing"
	"time"
)

// nobody is an agent that knows nothing.
func nobody(context.Context, Query) ([]byte, bool) { return nil, false }

// Of what comes back only the answer to what was asked is given to the client.
func TestGuessesAreNotRelayed(t *testing.T) {
	o := newOutpost(t)
	o.serveElsewhere()
	o.serve(o.open(), nobody)
	guess := [4]byte{203, 0, 113, 66}
	var ids sync.Map
	answers := func(query []byte) [][]byte {
		ids.Store([2]byte(query[:2]), true)
		otherID, otherName, noReply := answerTo(query, guess), answerTo(query, guess), answerTo(query, guess)
		otherID[0] ^= 0xff
		otherName[13]++
		noReply[2] &^= 0x80
		return [][]byte{otherID, otherName, noReply}[:len(query)%3] // 21 bytes and more by the name
	}
	right := func(query []byte) [][]byte { return append(answers(query), answerTo(query, elsewhere)) }
	o.deny.Store(&right)
	for _, name := range []string{"web.", "webs.", "WeB-7.Example."} {
		for _, kind := range kinds {
			o.client(o.NetNS, kind.network, kind.to, kind.connected).expect(t, "after guesses; "+kind.name, name, elsewhere)
		}
	}
	if _, same := ids.Load([2]byte{0, 7}); same {
		t.Error("the DNS Service was asked with the client's id")
	}
}

// Where nothing right comes the client gets nothing, and the DNS Service is asked again.
func TestTheServiceIsAskedAgain(t *testing.T) {
	o := newOutpost(t)
	o.settings.asked = 300 * time.Millisecond
	o.serveElsewhere()
	l := o.open()
	o.serve(l, nobody)
	var asked int
	later := func(query []byte) [][]byte {
		if asked++; asked < 3 {
			return nil
		}
		return [][]byte{answerTo(query, elsewhere)}
	}
	o.deny.Store(&later)
	begun := time.Now()
	o.client(o.NetNS, "udp4", dns4, true).expect(t, "the third is answered", "web.", elsewhere)
	if took := time.Since(begun); took < 2*o.settings.asked {
		t.Errorf("asked three times in %v", took)
	}
	never := func([]byte) [][]byte { return nil }
	o.deny.Store(&never)
	c := o.client(o.NetNS, "udp4", dns4, true)
	if _, err := c.Write(question(t, 9, "web.")); err != nil {
		t.Fatal(err)
	}
	for begun := time.Now(); o.events(l)["agent_unanswered"] == 0 && time.Since(begun) < 20*time.Second; time.Sleep(time.Millisecond) {
	}
	_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := c.Read(make([]byte, 100)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("nobody answers, and %d bytes came, %v", n, err)
	}
	if is := o.events(l); is["agent_unanswered"] != 1 || is["agent_relayed"] != 1 {
		t.Errorf("counted %v", is)
	}
}

// A client that sends what is no question is told so; what is no query has no answer.
func TestMalformed(t *testing.T) {
	o := newOutpost(t)
	o.serveElsewhere()
	l := o.open()
	o.serve(l, knows)
	c := o.client(o.NetNS, "udp4", dns4, true)
	query := question(t, 0x1234, "web.")
	two := slices.Clone(query)
	two[5] = 2
	cut := query[:len(query)-1]
	for _, sent := range [][]byte{two, cut, append([]byte{0x12, 0x34, 1, 0, 0, 1}, make([]byte, 6)...)} {
		if _, err := c.Write(sent); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		got := make([]byte, 100)
		n, err := c.Read(got)
		if want := []byte{0x12, 0x34, 0x81, 1, 0, 0, 0, 0, 0, 0, 0, 0}; err != nil || !bytes.Equal(got[:n], want) {
			t.Errorf("%x is answered %x, %v; not %x", sent, got[:n], err, want)
		}
	}
	for _, sent := range [][]byte{answerTo(query, here), query[:11]} {
		if _, err := c.Write(sent); err != nil {
			t.Fatal(err)
		}
	}
	c.expect(t, "a query behind them", "web.", here)
	if is := o.events(l); is["agent_malformed"] != 5 {
		t.Errorf("counted %v", is)
	}
	if n := o.asked.Load(); n > 0 {
		t.Errorf("the DNS Service was asked %d times", n)
	}
}

// When many queries are in hand the DNS Service has the next ones, until some are answered.
func TestTooManyInHand(t *testing.T) {
	o := newOutpost(t)
	o.serveElsewhere()
	l := o.open()
	answered := make(chan struct{})
	o.serve(l, func(_ context.Context, q Query) ([]byte, bool) {
		<-answered
		return answerTo(q.Message, here), true
	})
	first := o.client(o.NetNS, "udp4", dns4, false)
	for id := range mostInHand/2 - 1 {
		if _, err := first.WriteToUDPAddrPort(question(t, uint16(id), "web."), dns4); err != nil {
			t.Fatal(err)
		}
	}
	next := o.client(o.NetNS, "udp4", dns4, false)
	if _, err := next.WriteToUDPAddrPort(question(t, 1, "web."), dns4); err != nil {
		t.Fatal(err)
	}
	for begun := time.Now(); o.events(l)["aside"] == 0; { // once it is in hand
		c := o.client(o.NetNS, "udp4", dns4, false)
		if _, err := c.WriteToUDPAddrPort(question(t, 1, "web."), dns4); err != nil {
			t.Fatal(err)
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("counted %v", o.events(l))
		}
	}
	next.to = dns4
	o.client(o.NetNS, "udp4", dns4, false).expect(t, "too many are in hand", "web.", elsewhere)
	close(answered)
	o.client(o.NetNS, "udp4", dns4, false).await(t, "all are answered, and the agent is not asked", "web.", here)
}

// What is in hand when the agent is told to end is answered before it ends.
func TestTheEndAnswersWhatIsInHand(t *testing.T) {
	o := newOutpost(t)
	o.serveElsewhere()
	l := o.open()
	inHand := make(chan struct{}, 100)
	stop := o.serve(l, func(_ context.Context, q Query) ([]byte, bool) {
		inHand <- struct{}{}
		time.Sleep(300 * time.Millisecond)
		return answerTo(q.Message, here), true
	})
	var asking sync.WaitGroup
	for range 50 {
		c := o.client(o.NetNS, "udp4", dns4, true)
		asking.Go(func() { c.expect(t, "in hand at the end", "web.", here) })
	}
	for range 50 {
		<-inHand
	}
	stop()
	asking.Wait()
}

// Whatever comes, a question is found in bounds and is the same in any case, and only a
// reply that has it is one.
func FuzzQuestion(f *testing.F) {
	f.Add(append([]byte{0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, "\x03wEb\x00\x00\x01\x00\x01"...))
	f.Add([]byte{0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 63})
	f.Fuzz(func(t *testing.T, message []byte) {
		of := questionOf(message)
		if of == nil {
			return
		}
		if len(of) > len(message)-header || !bytes.EqualFold(of, message[header:header+len(of)]) || len(of) > mostName+questionTail {
			t.Fatalf("the question of %x is %x", message, of)
		}
		reply := slices.Clone(message)
		reply[2] |= 0x80
		query := slices.Clone(message)
		query[2] &^= 0x80
		if !replies(reply, query, of) || replies(query, query, of) {
			t.Fatalf("%x is not taken for a reply to itself, or is without QR", message)
		}
		reply[header+len(of)-1] ^= 0x40
		if replies(reply, query, of) {
			t.Fatalf("%x is taken for a reply to another class", message)
		}
	})
}
