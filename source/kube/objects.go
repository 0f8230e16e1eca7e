package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
)

// ErrNoKind says that the API server does not have a kind of objects at all: a CRD that
// is not installed, or a version of Kubernetes without it.
var ErrNoKind = errors.New("the API server does not have this kind")

const (
	// objectsPage is how many objects are asked for at a time.
	objectsPage = 500
	// pagePatience is how long one server may take for a page.
	pagePatience = 30 * time.Second
)

// API asks an API server for objects of any kind, once.
type API struct{ servers *servers }

// OpenAPI prepares to ask. It reads the credentials and sends nothing.
func OpenAPI(settings Settings) (*API, error) {
	if settings.Account == "" {
		settings.Account = accountFolder
	}
	servers, err := connect(settings)
	if err != nil {
		return nil, err
	}
	return &API{servers}, nil
}

// Objects calls each with every object of the kind that a path such as "/api/v1/pods"
// leads to, as JSON, a page of 500 at a time. It needs the verb list. An answer that
// refuses is the error; ErrNoKind and ErrNoAnswer are told apart.
func (a *API) Objects(ctx context.Context, path string, each func(object []byte) error) error {
	for next := ""; ; {
		page, err := a.page(ctx, path, next)
		if err != nil {
			return err
		}
		for _, object := range page.Items {
			if err := each(object); err != nil {
				return err
			}
		}
		if next = page.Metadata.Continue; next == "" {
			return nil
		}
	}
}

// page is a part of a list.
type page struct {
	Metadata struct{ Continue string }
	Items    []json.RawMessage
}

// page asks one server after the other, each once.
func (a *API) page(ctx context.Context, path, next string) (p page, err error) {
	for range a.servers.all {
		at := a.servers.current()
		data, asked := at.objects(ctx, path, next)
		switch status := apierrors.APIStatus(nil); {
		case asked == nil:
			if err := json.Unmarshal(data, &p); err != nil {
				return p, fmt.Errorf("list %s at %s: %w", path, at.url, err)
			}
			return p, nil
		case apierrors.IsNotFound(asked):
			return p, fmt.Errorf("list %s: %w", path, ErrNoKind)
		case apierrors.IsForbidden(asked) || apierrors.IsUnauthorized(asked):
			return p, fmt.Errorf("list %s: %w: it takes the verb list, for that resource in a ClusterRole", path, asked)
		case errors.As(asked, &status) && status.Status().Code/100 == 4:
			return p, fmt.Errorf("list %s: %w", path, asked)
		default:
			err = fmt.Errorf("list %s at %s: %w", path, at.url, asked)
			a.servers.leave(at)
		}
	}
	return p, fmt.Errorf("%w: %w", ErrNoAnswer, err)
}

func (s *server) objects(ctx context.Context, path, next string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, pagePatience)
	defer cancel()
	ask := s.client.Get().AbsPath(strings.TrimSuffix(path, "/")).MaxRetries(0).
		SetHeader("Accept", runtime.ContentTypeJSON).Param("limit", strconv.Itoa(objectsPage))
	if next != "" {
		ask = ask.Param("continue", next)
	}
	answer := ask.Do(ctx)
	if err := answer.Error(); err != nil {
		return nil, err // the server's words, where it has some
	}
	return answer.Raw()
}
