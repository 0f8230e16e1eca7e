package resolver

import (
	"sync"
	"time"
)

const (
	// eachSecond and eachBurst bound the queries of one pod that the agent looks at, and
	// eachWaiting those of them that wait for a server. What is more goes to the cluster's DNS
	// servers. A browser that opens a page asks for some tens of names.
	eachSecond  = 1000
	eachBurst   = 2000
	eachWaiting = 256
	// allWaiting bounds the names that servers are asked for at once, so sockets too.
	allWaiting = 1024
	// earlyWaiting bounds those beside them that nobody waits for yet.
	earlyWaiting = 128
	// podsMost bounds the pods that are counted apart; the others share one limit.
	podsMost = 4096
	// idle is after how long a pod's count is as good as new, and forgotten.
	idle = eachBurst / eachSecond * time.Second
)

// limits are the pods' shares of the agent.
type limits struct {
	mu   sync.Mutex
	pods map[string]*share
}

// share is what one pod has used.
type share struct {
	tokens  float64
	filled  time.Time
	waiting int
}

// enter counts a query of a pod; it says whether the pod may ask.
func (l *limits) enter(pod string, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.share(pod, now)
	if passed := now.Sub(s.filled); passed > 0 {
		s.tokens = min(eachBurst, s.tokens+passed.Seconds()*eachSecond)
		s.filled = now
	}
	if s.tokens < 1 {
		return false
	}
	s.tokens--
	return true
}

// wait counts a query that waits until done is called; ok says whether it may.
func (l *limits) wait(pod string, now time.Time) (done func(), ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.share(pod, now)
	if s.waiting >= eachWaiting {
		return nil, false
	}
	s.waiting++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		s.waiting--
	}, true
}

func (l *limits) share(pod string, now time.Time) *share {
	if s := l.pods[pod]; s != nil {
		return s
	}
	if len(l.pods) >= podsMost {
		for name, s := range l.pods {
			if s.waiting == 0 && now.Sub(s.filled) > idle {
				delete(l.pods, name)
			}
		}
		if len(l.pods) >= podsMost {
			pod = ""
		}
	}
	s := l.pods[pod]
	if s == nil {
		s = &share{tokens: eachBurst, filled: now}
		l.pods[pod] = s
	}
	return s
}
